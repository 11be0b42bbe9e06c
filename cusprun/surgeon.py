"""Optimal brain surgeon in blocks: which inputs of a matrix go when the others make up for them.

Hassibi and Stork 1993; in blocks with updates between as ZipLM (Kurtic et al. 2023). With H = E[x xᵀ] of the matrix's
inputs, removing the inputs R at best adds tr(W_R ([H⁻¹]_RR)⁻¹ W_Rᵀ) to the squared change of its output. Several
corpora may judge, each with its own H: a unit then goes by the largest of its ranks, or of its relative costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from cusprun.errors import Failed

RIDGE = 1e-2  # of the mean diagonal of H, for the inverse
STEPS = 24  # blocks in which a layer's columns go, each followed by an update of what is left

Agreement = Literal["intersection", "max"]


class _Judge:
    """One corpus's view of a matrix: its columns, moved to make up for those gone, and H⁻¹ conditioned on what is left.

    Nothing shrinks: rows and columns of what is gone become zero and are not looked at again.
    """

    def __init__(self, matrix: torch.Tensor, moments: torch.Tensor) -> None:
        self.matrix = matrix.clone()
        self.used = moments.diagonal() > 0
        self.energy = float(((matrix @ moments) * matrix).sum().clamp_min(torch.finfo(torch.float64).tiny))
        self.inverse = damped_inverse(moments)

    def column_costs(self) -> torch.Tensor:
        """Relative cost of each column: ‖w_j‖² / [H⁻¹]_jj, and nothing where its input is always zero."""
        return self.matrix.square().sum(0) / self.inverse.diagonal() * self.used / self.energy

    def group_costs(self, run: int, left: torch.Tensor) -> torch.Tensor:
        """Relative cost of each group of ``run`` neighbouring columns; those not ``left`` cost nothing."""
        costs = torch.zeros(len(left), dtype=self.matrix.dtype)
        for place in left.nonzero().flatten().tolist():
            group = slice(place * run, (place + 1) * run)
            block = self.matrix[:, group]
            costs[place] = (solve_symmetric(self.inverse[group, group], block.T).T * block).sum() / self.energy
        return costs

    def remove(self, gone: torch.Tensor) -> None:
        """Takes columns out: the others make up for them, and H⁻¹ is conditioned on what is left."""
        across = self.inverse[:, gone]
        step = solve_symmetric(across[gone], across.T)
        self.matrix.addmm_(self.matrix[:, gone], step, alpha=-1)
        self.inverse.addmm_(across, step, alpha=-1)


def choose_columns(
    matrix: torch.Tensor,
    moments: Iterable[torch.Tensor],
    keeps: Sequence[int],
    agreement: Agreement = "intersection",
    steps: int = STEPS,
) -> list[list[int]]:
    """Columns that stay, ascending, for each number of ``keeps``, descending.

    ``matrix`` is (rows, n), each of ``moments`` (n, n), float64, which are used up. The cheapest columns go first, in
    about ``steps`` blocks, so what stays at a smaller number stays at a larger one too.
    """
    if not keeps:
        return []
    left = torch.ones(matrix.shape[1], dtype=torch.bool)
    judges = [_Judge(matrix, each) for each in moments]
    size = max(1, -(-(len(left) - min(keeps)) // steps))
    found = []
    for keep in keeps:
        while (many := int(left.sum())) > keep:
            costs = _agree([judge.column_costs() for judge in judges], left, agreement)
            gone = torch.argsort(costs, stable=True)[: min(size, many - keep)].sort().values
            left[gone] = False
            if left.any():
                for judge in judges:
                    judge.remove(gone)
        found.append(left.nonzero().flatten().tolist())
    return found


def choose_groups(
    matrix: torch.Tensor,
    moments: Iterable[torch.Tensor],
    keeps: Sequence[int],
    run: int,
    agreement: Agreement = "intersection",
) -> list[list[int]]:
    """The same for groups of ``run`` neighbouring columns, which go one at a time: kv groups with their query heads."""
    left = torch.ones(matrix.shape[1] // run, dtype=torch.bool)
    judges = [_Judge(matrix, each) for each in moments]
    found = []
    for keep in keeps:
        while int(left.sum()) > keep:
            place = int(_agree([judge.group_costs(run, left) for judge in judges], left, agreement).argmin())
            left[place] = False
            if left.any():
                for judge in judges:
                    judge.remove(torch.arange(place * run, (place + 1) * run))
        found.append(left.nonzero().flatten().tolist())
    return found


def _agree(costs: Sequence[torch.Tensor], left: torch.Tensor, agreement: Agreement) -> torch.Tensor:
    """One cost for each unit, from every judge's relative costs; infinite for what is gone."""
    stacked = torch.stack([each.where(left, torch.inf) for each in costs])
    largest = stacked.amax(0)
    if len(costs) == 1 or agreement == "max":
        return largest
    ranks = stacked.argsort(dim=1, stable=True).argsort(dim=1, stable=True).amax(0)
    return (ranks + largest / (1 + largest[left].max())).where(left, torch.inf)  # ties in rank go to the smaller cost


def damped_inverse(moments: torch.Tensor) -> torch.Tensor:
    """(H + λI)⁻¹, in the memory of H: ``moments`` is used up. Raises Failed where H is zero or not finite."""
    scale = RIDGE * moments.diagonal().mean()
    if float(scale) <= 0:
        raise Failed("the inputs of a layer are zero throughout: the model is broken")
    moments.diagonal().add_(scale)  # far above what float32 sums can lack to be positive definite
    columns, failed = moments.T, torch.empty(0, dtype=torch.int32)  # symmetric, and LAPACK goes by columns: no copies
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    if int(failed):
        raise Failed("the moments of a layer's inputs are not finite: the model is broken")
    torch.cholesky_inverse(columns, out=columns)
    return moments


def solve_symmetric(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves left · X = right for a symmetric positive semi-definite matrix: Cholesky, else by its eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(left)
    if int(failed) == 0:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(left)
    floor = values.max().clamp_min(torch.finfo(left.dtype).tiny) * 1e-10
    return vectors @ ((vectors.T @ right) / values.clamp_min(floor).unsqueeze(1))
