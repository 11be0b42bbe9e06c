"""What is left of gate_proj and up_proj moves too: a narrowed gated FFN comes nearer to what it is to give.

f(x) = D(φ(Gx) ⊙ Ux) with D held is linear in U and smooth in G. To first order a step (P, Q) of (U, G) changes it by
D(a ⊙ Px + b ⊙ Qx) with a = φ(Gx) and b = φ'(Gx) ⊙ Ux, so that the step which brings f(x) nearest to a target t solves a
linear least-squares problem. Conjugate gradients solve it (Gauss-Newton with a truncated solve, damped as by Levenberg
1944 and Marquardt 1963). Their preconditioner takes channels for independent of each other and of the inputs, as K-FAC
(Martens and Grosse 2015) does: for channel k ‖d_k‖² E[a_k²] (C + λI) with C = E[x xᵀ]; the damping is a share of it.
One window in JUDGING takes no part in the fit; these say after how many iterations the step is the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch.nn.functional import linear

from cusprun.arithmetic import product_type
from cusprun.memory import HELD_BYTES

ITERATIONS = 6  # of conjugate gradients at most
DAMPING = 0.1  # of the preconditioner, added to the curvature
JUDGING = 8  # one window in so many judges
RIDGE = 0.1  # of the mean diagonal of C, added to it in the preconditioner


@dataclass(frozen=True)
class GatedFfn:
    """x -> down · (φ(gate · x + bias) ⊙ (up · x + bias)): gate and up are (channels, hidden), down (hidden, channels).

    float32, on one device; down's own bias is left to whoever makes the targets.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What down reads for ``x``, (tokens, hidden): (tokens, channels)."""
        gate, up = self._read(x)
        return self.activation(gate).mul_(up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What down gives, (tokens, hidden)."""
        return product(self.inner(x), self.down)

    def factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """a, b and what down reads of every token, (tokens, channels) each."""
        gate, up = self._read(x)
        with torch.enable_grad():
            gate.requires_grad_()
            active = self.activation(gate)
            (slope,) = torch.autograd.grad(active.sum(), gate)
        active = active.detach()
        return active, slope.mul_(up), up.mul_(active)

    def moved(self, step: Step) -> GatedFfn:
        """With the step added to up and gate."""
        return replace(self, up=self.up + step.up, gate=self.gate + step.gate)

    def _read(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = product(x, self.gate), product(x, self.up)
        if self.gate_bias is not None:
            gate += self.gate_bias
        if self.up_bias is not None:
            up += self.up_bias
        return gate, up


@dataclass(frozen=True)
class Windows:
    """Hidden states before the FFN and what it is to give, (windows, tokens, hidden) float32 each, on its device.

    An error at a token counts ``scales`` times, (windows, tokens, 1). ``read`` makes the FFN's inputs of the states,
    (…, hidden), when they are asked for: a norm, token by token.
    """

    states: torch.Tensor
    targets: torch.Tensor
    scales: torch.Tensor
    read: Callable[[torch.Tensor], torch.Tensor] = lambda states: states

    def tokens(self, part: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs and targets of some of the windows' tokens, (tokens, hidden) each, and their scales, (tokens, 1)."""
        inputs = self.read(self.states[part]).flatten(0, 1)
        return inputs, self.targets[part].flatten(0, 1), self.scales[part].flatten(0, 1)


Batches = Callable[[], Iterable[Windows]]
# Inputs, a and b of a batch's tokens, as products take them; a and b in the token's scale.
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def improve(ffn: GatedFfn, batches: Batches, iterations: int = ITERATIONS) -> GatedFfn:
    """The FFN with the up and gate of the last iteration that lowered E‖t - f(x)‖² on the windows set aside to judge.

    As it was where the first does not, and where there is too little text to set any aside. ``batches`` gives the same
    windows in every call.
    """
    best, least = ffn, judged(ffn, batches)
    for step in _steps(ffn, batches, iterations):
        candidate = ffn.moved(step)
        error = judged(candidate, batches)
        if not error < least:  # going on would fit the other windows alone
            break
        best, least = candidate, error
    return best


def judged(ffn: GatedFfn, batches: Batches) -> float:
    """Sum of ‖t - f(x)‖² over the windows set aside."""
    total = 0.0
    for windows, first in _divided(batches):
        x, targets, scales = windows.tokens(slice(first, None))
        total += float((targets - ffn(x)).mul_(scales).square().sum(dtype=torch.float64))
    return total


def _divided(batches: Batches) -> Iterator[tuple[Windows, int]]:
    """Each batch with the number of its first window that judges: about one window in JUDGING does.

    Where a batch has fewer windows than that, the last one of every so many batches.
    """
    every = 1
    for number, windows in enumerate(batches(), 1):
        count = len(windows.targets)
        if number == 1:
            every = -(-JUDGING // count)
        yield windows, count - (max(1, count // JUDGING) if number % every == 0 else 0)


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x · matrixᵀ, (tokens, rows) float32; factors and result are rounded where the processor has units for that."""
    kind = product_type(x.device.type)
    return linear(x.to(kind), matrix.to(kind)).float()


@dataclass(frozen=True)
class Step:
    """What is added to up and gate, or a gradient of theirs, (channels, hidden) each."""

    up: torch.Tensor
    gate: torch.Tensor

    def dot(self, other: Step) -> float:
        return float((self.up * other.up).sum(dtype=torch.float64) + (self.gate * other.gate).sum(dtype=torch.float64))

    def add(self, other: Step, factor: float) -> None:
        """Adds ``factor`` times the other, in place."""
        self.up.add_(other.up, alpha=factor)
        self.gate.add_(other.gate, alpha=factor)

    def plus(self, other: Step, factor: float) -> Step:
        """This one and ``factor`` times the other, as a new one."""
        return Step(self.up.add(other.up, alpha=factor), self.gate.add(other.gate, alpha=factor))


def _steps(ffn: GatedFfn, batches: Batches, iterations: int) -> Iterator[Step]:
    """The step after each iteration of preconditioned conjugate gradients; the same object, moved on."""
    problem = _Problem(ffn, batches)
    if not problem.tokens:
        return
    step = Step(torch.zeros_like(ffn.up), torch.zeros_like(ffn.gate))
    rest = problem.right
    eased = problem.precondition(rest)
    way, size = eased, rest.dot(eased)
    for _ in range(iterations):
        if not size > 0:  # nothing is left to gain
            return
        bent = problem.curvature(way)
        length = size / way.dot(bent)
        step.add(way, length)
        rest.add(bent, -length)
        yield step
        eased = problem.precondition(rest)
        before, size = size, rest.dot(eased)
        way = eased.plus(way, size / before)


class _Problem:
    """The linear least-squares problem of one step: its right side, its curvature, its preconditioner."""

    def __init__(self, ffn: GatedFfn, batches: Batches) -> None:
        self.ffn, self.batches = ffn, batches
        self.kind = product_type(ffn.down.device.type)
        self.down, self.back = ffn.down.to(self.kind), ffn.down.T.contiguous().to(self.kind)
        self.held: list[Factors] = []  # of the first batches, as many as there is room for
        self.tokens = 0
        self.right = Step(torch.zeros_like(ffn.up), torch.zeros_like(ffn.gate))
        squares = Step(torch.zeros_like(ffn.up[:, 0]), torch.zeros_like(ffn.up[:, 0]))
        inputs = torch.zeros(ffn.up.shape[1], ffn.up.shape[1], device=ffn.up.device)
        room = HELD_BYTES
        for windows, first in _divided(batches):
            x, targets, scales = windows.tokens(slice(first))
            a, b, inner = ffn.factors(x)
            left = (targets - product(inner, ffn.down)).mul_(scales)
            del inner
            a, b = a * scales, b * scales
            squares.up.add_(a.square().sum(0))
            squares.gate.add_(b.square().sum(0))
            rounded = x.to(self.kind)
            inputs += (rounded.T @ rounded).float()
            self.tokens += len(x)
            batch = (rounded, a.to(self.kind), b.to(self.kind))
            self._add_pulled(self.right, batch, left.to(self.kind))
            room -= sum(tensor.nbytes for tensor in batch)
            if room >= 0:
                self.held.append(batch)
        # per channel ‖d_k‖² Σ a_k², with a floor for dead ones; per input the inverse of E[x xᵀ] with its ridge
        weights = ffn.down.square().sum(0)
        floor = torch.finfo(torch.float32).tiny
        up, gate = weights * squares.up, weights * squares.gate
        self.scale = Step(*(each.clamp_min(max(floor, float(each.mean()) * 1e-6))[:, None] for each in (up, gate)))
        inputs.div_(max(1, self.tokens)).diagonal().add_(RIDGE * inputs.diagonal().mean().clamp_min(floor))
        self.inputs = inputs
        self.inverse = torch.linalg.inv(inputs.double()).float()

    def precondition(self, given: Step) -> Step:
        return Step(given.up @ self.inverse / self.scale.up, given.gate @ self.inverse / self.scale.gate)

    def curvature(self, way: Step) -> Step:
        """The damped curvature times ``way``."""
        found = Step(
            (way.up @ self.inputs).mul_(DAMPING * self.scale.up),
            (way.gate @ self.inputs).mul_(DAMPING * self.scale.gate),
        )
        up, gate = way.up.to(self.kind), way.gate.to(self.kind)
        for batch in self._batches():
            x, a, b = batch
            self._add_pulled(found, batch, linear(linear(x, up).mul_(a) + linear(x, gate).mul_(b), self.down))
        return found

    def _add_pulled(self, sums: Step, batch: Factors, outputs: torch.Tensor) -> None:
        """Adds what ``outputs``, (tokens, hidden), say of up and gate."""
        x, a, b = batch
        channels = linear(outputs, self.back)
        sums.up.add_((channels * a).T @ x)
        sums.gate.add_((channels * b).T @ x)

    def _batches(self) -> Iterator[Factors]:
        yield from self.held
        for windows, first in islice(_divided(self.batches), len(self.held), None):
            x, _, scales = windows.tokens(slice(first))
            a, b, _ = self.ffn.factors(x)
            yield x.to(self.kind), (a * scales).to(self.kind), (b * scales).to(self.kind)
