"""The kept columns of a matrix at the least-squares optimum, ridge and target chosen across two halves of the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cusprun.gram import Gram
from cusprun.surgeon import solve_symmetric

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # of the mean diagonal of H


def fit(matrix: torch.Tensor, gram: Gram, kept: torch.Tensor) -> torch.Tensor:
    """The matrix's kept columns at the least-squares optimum, (rows, kept) float32, from the (rows, n) float64.

    The target is the gram's, between that and what all columns give, or the latter alone where it has none. Of RIDGES,
    and of α, the one that leaves the least error across the halves of the windows; columns as they were take part.
    """
    judged = [_Judged.of(matrix, gram, half) for half in (0, 1)]
    sliced = matrix[:, kept]
    best = (sum(part.error(sliced, kept) for part in judged), None, 0.0)
    for ridge in RIDGES:
        constant, slope, curve = 0.0, 0.0, 0.0
        for part, other in zip(judged, reversed(judged), strict=True):
            own, change = least_squares(matrix, part.moments, part.crossed, kept, ridge)
            constant += other.error(own, kept)
            steps = other.along(own, change, kept)
            slope, curve = slope + steps[0], curve + steps[1]
        alpha = min(1.0, max(0.0, -slope / (2 * curve))) if curve > 0 and gram.crossed is not None else 0.0
        best = min(best, (constant + alpha * slope + alpha**2 * curve, ridge, alpha), key=lambda trial: trial[0])
    _, ridge, alpha = best
    if ridge is None:
        return sliced.float()
    whole = _Judged.of(matrix, gram, 0, 1)
    own, change = least_squares(matrix, whole.moments, whole.crossed, kept, ridge)
    return (own + alpha * change).float()


@dataclass(frozen=True)
class _Judged:
    """Means over some of the windows, float64: E[x xᵀ], E[t xᵀ], E‖t‖²."""

    moments: torch.Tensor
    crossed: torch.Tensor
    energy: float

    @classmethod
    def of(cls, matrix: torch.Tensor, gram: Gram, *halves: int) -> _Judged:
        moments = gram.mean(*halves)
        if gram.crossed is None:  # t = W x
            crossed = matrix @ moments
            return cls(moments, crossed, float((crossed * matrix).sum()))
        count = sum(gram.counts[half] for half in halves)
        return cls(moments, gram.cross(*halves), sum(gram.energy[half] for half in halves) / count)

    def error(self, candidate: torch.Tensor, kept: torch.Tensor) -> float:
        """E‖t - V x_S‖² for V, (rows, kept)."""
        inside = self.moments[kept][:, kept]
        return float(((candidate @ inside - 2 * self.crossed[:, kept]) * candidate).sum()) + self.energy

    def along(self, start: torch.Tensor, change: torch.Tensor, kept: torch.Tensor) -> tuple[float, float]:
        """Coefficients of α and α² in the error of start + α change."""
        moved = change @ self.moments[kept][:, kept]
        slope = 2 * float((moved * start).sum() - (change * self.crossed[:, kept]).sum())
        return slope, float((moved * change).sum())


def least_squares(
    matrix: torch.Tensor, moments: torch.Tensor, crossed: torch.Tensor, kept: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimum for the target W x, (rows, kept) float64, and the way from it to that for the target t.

    Each minimizes E‖target - W_S x_S‖² + λ‖W_S - W[:, S]‖², with λ = ``ridge`` times the mean diagonal of ``moments``;
    the penalty pulls towards the columns as they were.
    """
    scale = ridge * moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    inside = moments[kept][:, kept] + scale * torch.eye(len(kept), dtype=moments.dtype)
    wanted = matrix @ moments[:, kept]
    right = torch.cat([wanted + scale * matrix[:, kept], crossed[:, kept] - wanted])
    own, change = solve_symmetric(inside, right.T).T.split(len(matrix))
    return own, change


def refitted(matrix: torch.Tensor, moments: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """The kept columns at their optimum for what all of them give, (rows, kept) float32, at a given ridge."""
    return least_squares(matrix, moments, matrix @ moments, kept, ridge)[0].float()
