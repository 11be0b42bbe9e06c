"""Least-squares refit: what is left of down_proj and o_proj moves to where it makes up for the units that go.

A second pass takes, layer by layer, H = mean x xᵀ of the inputs of the two matrices on the calibration text, all
dimensions alike. With H the units of a layer are chosen anew, as many as the plan keeps, by optimal brain surgeon
(Hassibi and Stork 1993; in blocks as ZipLM, Kurtic et al. 2023); the kept columns become the least-squares optimum
W_S = (W H_{:,S} + λ W_{:,S}) (H_SS + λI)⁻¹.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cusprun.checkpoint import Weights, write_weights
from cusprun.errors import Failed
from cusprun.files import folder_written_whole
from cusprun.plan import LayerPlan, Plan, make_plan
from cusprun.statistics import Batch, walk

DOWN, OUTPUT = "mlp.down_proj.weight", "self_attn.o_proj.weight"
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)  # of the mean diagonal of H; which one, held-out windows decide
CHOOSING_RIDGE = 1e-2
STEPS = 24  # blocks in which a layer's channels go, each followed by an update of what is left


@dataclass
class Gram:
    """Sums of x xᵀ over two halves of the windows, each (n, n) float64, with their counts of tokens."""

    halves: list[torch.Tensor]
    counts: list[float]

    @classmethod
    def empty(cls, n: int) -> Gram:
        return cls([torch.zeros(n, n, dtype=torch.float64) for _ in range(2)], [0.0, 0.0])

    def add(self, x: torch.Tensor, half: int, weight: float = 1.0) -> None:
        """Adds the rows of ``x``, (tokens, n), to one half; products in float32."""
        self.halves[half] += (x.T @ x).double().cpu() * weight
        self.counts[half] += len(x) * weight

    def add_windows(self, x: torch.Tensor, batch: Batch, weight: float) -> None:
        """Adds a batch's inputs, every other window to either half."""
        windows = x.unflatten(0, (-1, batch.window))
        for offset in range(min(2, len(windows))):
            self.add(windows[offset::2].flatten(0, 1), (batch.start + offset) % 2, weight)

    def mean(self, *halves: int) -> torch.Tensor:
        """E[x xᵀ] over the named halves."""
        count = sum(self.counts[half] for half in halves)
        if count == 0:
            raise ValueError("no token was added to this half")
        total: torch.Tensor = sum((self.halves[half] for half in halves), torch.zeros(1, dtype=torch.float64)) / count
        return total


def refit(dense: Path, plan: Plan, windows: Mapping[str, np.ndarray], out: Path, *, device: str = "cpu") -> Plan:
    """Writes the new matrices of every layer to the folder ``out``, whole or not at all, and returns the new plan.

    The counts are ``plan``'s, the units are chosen here. One layer's moments are held at a time. Raises what
    :func:`cusprun.statistics.walk` raises.
    """
    chosen: list[LayerPlan] = []
    sizes = {}
    for index, widths in enumerate(plan.expert.layers):
        for name, columns in ((DOWN, widths.ffn), (OUTPUT, widths.heads * plan.dense.head_dim)):
            sizes[plan.dense.prefix(index) + name] = plan.dense.hidden_size * columns * 4
    with folder_written_whole(out) as part:
        write_weights(part, _layers(dense, plan, windows, device, chosen), sizes)
    return make_plan(plan.dense, tuple(chosen))


def _layers(
    dense: Path, plan: Plan, windows: Mapping[str, np.ndarray], device: str, chosen: list[LayerPlan]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the new matrices by name, float32, and appends what each layer keeps to ``chosen``."""
    anatomy, weights = plan.dense, Weights(dense)
    tokens = {name: ids.size for name, ids in windows.items()}
    for index, batches in walk(dense, anatomy, windows, label="refit, layer by layer", device=device):
        widths, kept = anatomy.layers[index], plan.layers[index]
        channels, heads = Gram.empty(widths.ffn), Gram.empty(widths.heads * anatomy.head_dim)
        for batch in batches:
            channels.add_windows(batch.channels, batch, 1 / tokens[batch.dimension])
            heads.add_windows(batch.heads, batch, 1 / tokens[batch.dimension])
        prefix, run = anatomy.prefix(index), widths.heads // widths.kv_heads * anatomy.head_dim
        down, output = weights[prefix + DOWN].double(), weights[prefix + OUTPUT].double()
        ffn = choose_columns(down, channels.mean(0, 1), len(kept.ffn))
        groups = choose_groups(output, heads.mean(0, 1), len(kept.kv_heads), run)
        chosen.append(LayerPlan(tuple(ffn), tuple(groups)))
        columns = torch.cat([torch.arange(group * run, (group + 1) * run) for group in groups])
        yield prefix + DOWN, fit(down, channels, torch.tensor(ffn))
        yield prefix + OUTPUT, fit(output, heads, columns)


def fit(matrix: torch.Tensor, gram: Gram, kept: torch.Tensor) -> torch.Tensor:
    """The matrix's kept columns, (rows, kept) float32, at the least-squares optimum for the outputs of all columns.

    Keeps them as they are where every column stays. The ridge is the one of RIDGES that, fitted on either half of the
    windows, leaves the least error on the other; leaving the columns unchanged takes part as well.
    """
    if len(kept) == matrix.shape[1]:
        return matrix.float()

    def solve(moments: torch.Tensor, ridge: float) -> torch.Tensor:
        return least_squares(matrix, moments, kept, ridge)

    def error(candidate: torch.Tensor, moments: torch.Tensor) -> float:
        change = -matrix.clone()
        change[:, kept] += candidate
        return float(((change @ moments) * change).sum())

    sliced = matrix[:, kept]
    trials: dict[float | None, float] = {None: sum(error(sliced, gram.mean(half)) for half in (0, 1))}
    for ridge in RIDGES:
        trials[ridge] = sum(error(solve(gram.mean(1 - half), ridge), gram.mean(half)) for half in (0, 1))
    best = min(trials, key=lambda ridge: trials[ridge])
    return (sliced if best is None else solve(gram.mean(0, 1), best)).float()


def least_squares(matrix: torch.Tensor, moments: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """W_S that minimizes E‖W x - W_S x_S‖² + λ‖W_S - W[:, S]‖², (rows, kept) float64.

    ``ridge`` is λ over the mean diagonal of ``moments``. The penalty pulls towards the columns as they were.
    """
    scale = ridge * moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    inside = moments[kept][:, kept] + scale * torch.eye(len(kept), dtype=moments.dtype)
    wanted = matrix @ moments[:, kept] + scale * matrix[:, kept]
    return solve_symmetric(inside, wanted.T).T


def solve_symmetric(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves left · X = right for a symmetric positive semi-definite matrix: Cholesky, else by its eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(left)
    if int(failed) == 0:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(left)
    floor = values.max().clamp_min(torch.finfo(left.dtype).tiny) * 1e-10
    return vectors @ ((vectors.T @ right) / values.clamp_min(floor).unsqueeze(1))


def damped_inverse(moments: torch.Tensor) -> torch.Tensor:
    """(H + λI)⁻¹ with the ridge that units are chosen with."""
    scale = CHOOSING_RIDGE * moments.diagonal().mean()
    if float(scale) <= 0:
        raise Failed("the inputs of a layer are zero throughout: the model is broken")
    damped = moments + scale * torch.eye(len(moments), dtype=moments.dtype)
    return solve_symmetric(damped, torch.eye(len(moments), dtype=moments.dtype))


def choose_columns(matrix: torch.Tensor, moments: torch.Tensor, keep: int) -> list[int]:
    """Columns that stay, ascending, by optimal brain surgeon in blocks.

    Removing column j at best costs ‖w_j‖² / [H⁻¹]_jj, and nothing where its input is always zero. The cheapest go, what
    is left is updated, and so on.
    """
    left = torch.arange(matrix.shape[1])
    if keep >= len(left):
        return left.tolist()
    current, inverse = matrix.clone(), damped_inverse(moments)
    size = max(1, -(-(len(left) - keep) // STEPS))
    while len(left) > keep:
        costs = current.square().sum(0) / inverse.diagonal() * (moments.diagonal()[left] > 0)
        gone = torch.argsort(costs, stable=True)[: min(size, len(left) - keep)].sort().values
        current, inverse, left = _remove(current, inverse, left, gone)
    return left.tolist()


def choose_groups(matrix: torch.Tensor, moments: torch.Tensor, keep: int, run: int) -> list[int]:
    """kv groups that stay, ascending: each is ``run`` neighbouring columns, and the cheapest goes first.

    Removing group g at best costs tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ).
    """
    left = list(range(matrix.shape[1] // run))
    if keep >= len(left):
        return left
    current, inverse, columns = matrix.clone(), damped_inverse(moments), torch.arange(matrix.shape[1])
    while len(left) > keep:
        costs = []
        for place in range(len(left)):
            group = slice(place * run, (place + 1) * run)
            block = current[:, group]
            costs.append(float((solve_symmetric(inverse[group, group], block.T).T * block).sum()))
        place = int(np.argmin(costs))
        gone = torch.arange(place * run, (place + 1) * run)
        current, inverse, columns = _remove(current, inverse, columns, gone)
        left.pop(place)
    return left


def _remove(
    matrix: torch.Tensor, inverse: torch.Tensor, names: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes columns out: the others of ``matrix`` make up for them, and H⁻¹ is conditioned on what is left."""
    stays = torch.ones(len(names), dtype=torch.bool)
    stays[gone] = False
    step = solve_symmetric(inverse[gone][:, gone], inverse[gone][:, stays])  # ([H⁻¹]_RR)⁻¹ [H⁻¹]_RS
    updated = matrix[:, stays] - matrix[:, gone] @ step
    conditioned = inverse[stays][:, stays] - inverse[stays][:, gone] @ step
    return updated, (conditioned + conditioned.T) / 2, names[stays]
