"""The kept columns of a matrix at the least-squares optimum, ridge and target chosen across two halves of the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cusprun.gram import Gram
from cusprun.surgeon import solve_symmetric

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # of the mean diagonal of the kept inputs' moments
START = RIDGES.index(1e-1)


def fit(matrix: torch.Tensor, gram: Gram, kept: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The matrix's kept columns at the least-squares optimum, (rows, kept) float32, from the (rows, n) float64, and α.

    The target is the gram's, between that and what all columns give, or the latter alone where it has none. Of RIDGES,
    and of α, the one that leaves the least error across the halves of the windows; columns as they were take part.
    The gram is used up.
    """
    sliced = matrix[:, kept]
    halves = [_Problem.of(matrix, gram, kept, half) for half in (0, 1)]
    targeted, share = gram.crossed is not None, gram.counts[0] / sum(gram.counts)
    gram.release()
    tried: dict[int, tuple[float, float]] = {}  # place in RIDGES -> error across the halves, α

    def error(place: int) -> float:
        if place not in tried:
            tried[place] = _across(halves, sliced, RIDGES[place], targeted)
        return tried[place][0]

    best = START  # the error has one valley over the ridge: downhill from the middle
    while True:
        nearby = [place for place in (best - 1, best + 1) if 0 <= place < len(RIDGES)]
        lower = min(nearby, key=error)
        if error(lower) >= error(best):
            break
        best = lower
    if sum(half.error(sliced) for half in halves) <= error(best):
        return sliced.float(), 0.0
    one, other = halves
    own, change = one.mixed(other, share).solve(sliced, RIDGES[best])
    alpha = tried[best][1]
    return (own + alpha * change).float(), alpha


def _across(halves: list[_Problem], sliced: torch.Tensor, ridge: float, targeted: bool) -> tuple[float, float]:
    """The error that fits on either half leave on the other, at the α that makes it least, and that α."""
    constant, slope, curve = 0.0, 0.0, 0.0
    for half, other in zip(halves, reversed(halves), strict=True):
        own, change = half.solve(sliced, ridge)
        constant += other.error(own)
        if targeted:
            moved = change @ other.inside
            slope += 2 * float((moved * own).sum() - (change * other.crossed).sum())
            curve += float((moved * change).sum())
    alpha = min(1.0, max(0.0, -slope / (2 * curve))) if curve > 0 else 0.0
    return constant + alpha * slope + alpha**2 * curve, alpha


@dataclass(frozen=True)
class _Problem:
    """Means over some of the windows, float64, with x_S the kept inputs."""

    inside: torch.Tensor  # E[x_S x_Sᵀ]
    own: torch.Tensor  # E[W x x_Sᵀ]
    crossed: torch.Tensor  # E[t x_Sᵀ]
    energy: float  # E‖t‖²

    @classmethod
    def of(cls, matrix: torch.Tensor, gram: Gram, kept: torch.Tensor, half: int) -> _Problem:
        every = gram.through(matrix, half)
        own, inside = every[:, kept], gram.inside(kept, half)
        if gram.crossed is None:  # t = W x
            return cls(inside, own, own, float((every * matrix).sum()))
        return cls(inside, own, gram.cross(half)[:, kept], gram.energy[half] / gram.counts[half])

    def mixed(self, other: _Problem, share: float) -> _Problem:
        """Both texts together; ``share`` of the tokens are this one's. Uses the memory of this one's moments."""
        inside = self.inside.mul_(share).add_(other.inside, alpha=1 - share)
        own, crossed = (
            share * mine + (1 - share) * theirs
            for mine, theirs in ((self.own, other.own), (self.crossed, other.crossed))
        )
        return _Problem(inside, own, crossed, share * self.energy + (1 - share) * other.energy)

    def solve(self, sliced: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The optimum for the target W x, (rows, kept), and the way from it to that for the target t.

        Each minimizes E‖target - V x_S‖² + λ‖V - W_S‖², with λ = ``ridge`` times the mean diagonal of E[x_S x_Sᵀ]; the
        penalty pulls towards the columns as they were.
        """
        scale = _scale(self.inside, ridge)
        damped = self.inside.clone()
        damped.diagonal().add_(scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        rights = ((self.own + scale * sliced).T, (self.crossed - self.own).T)
        if int(failed) == 0:
            own, change = (torch.cholesky_solve(right, factor).T for right in rights)
        else:
            damped = self.inside.clone()
            damped.diagonal().add_(scale)
            own, change = (solve_symmetric(damped, right).T for right in rights)
        return own, change

    def error(self, candidate: torch.Tensor) -> float:
        """E‖t - V x_S‖² for V, (rows, kept)."""
        return float(((candidate @ self.inside - 2 * self.crossed) * candidate).sum()) + self.energy


def refitted(matrix: torch.Tensor, gram: Gram, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """The kept columns at their optimum for what all of them give, (rows, kept) float32, at a given ridge.

    The gram's first half is all of the text, and stays as it is.
    """
    inside, sliced = gram.inside(kept, 0), matrix[:, kept]
    scale = _scale(inside, ridge)
    right = gram.through(matrix, 0)[:, kept].add_(scale * sliced)
    inside.diagonal().add_(scale)
    return solve_symmetric(inside, right.T).T.float()


def _scale(inside: torch.Tensor, ridge: float) -> torch.Tensor:
    """λ for ``ridge`` times the mean diagonal, above zero."""
    return ridge * inside.diagonal().mean().clamp_min(torch.finfo(inside.dtype).tiny)
