"""Optimal brain surgeon in blocks: which inputs of a matrix go when the others make up for them.

Hassibi and Stork 1993; in blocks with updates between as ZipLM (Kurtic et al. 2023). With H = E[x xᵀ] of the matrix's
inputs, removing the inputs R at best adds tr(W_R ([H⁻¹]_RR)⁻¹ W_Rᵀ) to the squared change of its output. Several
corpora may judge, each with its own H: a unit then goes by the largest of its ranks, or of its relative costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cusprun.errors import Failed

RIDGE = 1e-2  # of the mean diagonal of H, for the inverse
STEPS = 24  # blocks in which a layer's columns go, each followed by an update of what is left

Agreement = Literal["intersection", "max"]


class _Judge:
    """One corpus's view of a matrix: the columns left, moved to make up for those gone, and H⁻¹ over them."""

    def __init__(self, matrix: torch.Tensor, moments: torch.Tensor) -> None:
        self.matrix = matrix.clone()
        self.inverse = damped_inverse(moments)
        self.used = moments.diagonal() > 0
        self.energy = float(((matrix @ moments) * matrix).sum().clamp_min(torch.finfo(torch.float64).tiny))

    def column_costs(self) -> torch.Tensor:
        """Relative cost of each column left: ‖w_j‖² / [H⁻¹]_jj, and nothing where its input is always zero."""
        return self.matrix.square().sum(0) / self.inverse.diagonal() * self.used / self.energy

    def group_costs(self, run: int) -> torch.Tensor:
        """Relative cost of each group of ``run`` neighbouring columns left."""
        costs = []
        for start in range(0, self.matrix.shape[1], run):
            group = slice(start, start + run)
            block = self.matrix[:, group]
            costs.append((solve_symmetric(self.inverse[group, group], block.T).T * block).sum() / self.energy)
        return torch.stack(costs)

    def remove(self, gone: torch.Tensor) -> None:
        """Takes columns out: the others make up for them, and H⁻¹ is conditioned on what is left."""
        stays = torch.ones(self.matrix.shape[1], dtype=torch.bool)
        stays[gone] = False
        step = solve_symmetric(self.inverse[gone][:, gone], self.inverse[gone][:, stays])
        self.matrix = self.matrix[:, stays] - self.matrix[:, gone] @ step
        conditioned = self.inverse[stays][:, stays] - self.inverse[stays][:, gone] @ step
        self.inverse = (conditioned + conditioned.T) / 2
        self.used = self.used[stays]


def choose_columns(
    matrix: torch.Tensor,
    moments: Sequence[torch.Tensor],
    keeps: Sequence[int],
    agreement: Agreement = "intersection",
    steps: int = STEPS,
) -> list[list[int]]:
    """Columns that stay, ascending, for each number of ``keeps``, descending.

    ``matrix`` is (rows, n), each of ``moments`` (n, n), float64. The cheapest columns go first, in about ``steps``
    blocks, so what stays at a smaller number stays at a larger one too.
    """
    left = torch.arange(matrix.shape[1])
    judges = [_Judge(matrix, each) for each in moments]
    size = max(1, -(-(len(left) - min(keeps)) // steps))
    found = []
    for keep in keeps:
        while len(left) > keep:
            costs = _agree([judge.column_costs() for judge in judges], agreement)
            gone = torch.argsort(costs, stable=True)[: min(size, len(left) - keep)].sort().values
            left = _without(left, gone)
            for judge in judges:
                judge.remove(gone)
        found.append(left.tolist())
    return found


def choose_groups(
    matrix: torch.Tensor,
    moments: Sequence[torch.Tensor],
    keeps: Sequence[int],
    run: int,
    agreement: Agreement = "intersection",
) -> list[list[int]]:
    """The same for groups of ``run`` neighbouring columns, which go one at a time: kv groups with their query heads."""
    left = torch.arange(matrix.shape[1] // run)
    judges = [_Judge(matrix, each) for each in moments]
    found = []
    for keep in keeps:
        while len(left) > max(keep, 0):
            if len(left) == 1:
                left = left[:0]
                break
            place = int(_agree([judge.group_costs(run) for judge in judges], agreement).argmin())
            left = _without(left, torch.tensor([place]))
            for judge in judges:
                judge.remove(torch.arange(place * run, (place + 1) * run))
        found.append(left.tolist())
    return found


def _agree(costs: Sequence[torch.Tensor], agreement: Agreement) -> torch.Tensor:
    """One cost for each unit left, from every judge's relative costs."""
    if len(costs) == 1:
        return costs[0]
    stacked = torch.stack(list(costs))
    largest = stacked.amax(0)
    if agreement == "max":
        return largest
    ranks = stacked.argsort(dim=1, stable=True).argsort(dim=1, stable=True).amax(0)
    return ranks + largest / (1 + largest.max())  # ties in rank go to the smaller cost


def _without(left: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    stays = torch.ones(len(left), dtype=torch.bool)
    stays[places] = False
    return left[stays]


def damped_inverse(moments: torch.Tensor) -> torch.Tensor:
    """(H + λI)⁻¹. Raises Failed where H is zero throughout."""
    scale = RIDGE * moments.diagonal().mean()
    if float(scale) <= 0:
        raise Failed("the inputs of a layer are zero throughout: the model is broken")
    identity = torch.eye(len(moments), dtype=moments.dtype)
    return solve_symmetric(moments + scale * identity, identity)


def solve_symmetric(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves left · X = right for a symmetric positive semi-definite matrix: Cholesky, else by its eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(left)
    if int(failed) == 0:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(left)
    floor = values.max().clamp_min(torch.finfo(left.dtype).tiny) * 1e-10
    return vectors @ ((vectors.T @ right) / values.clamp_min(floor).unsqueeze(1))
