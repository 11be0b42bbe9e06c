"""Combines what several dimensions say about one layer's units into one removal order and one change per unit.

intersection  a unit is as needed as the dimension that needs it most, by within-layer rank: removing the first m units
              takes the same cut in each dimension, and they are irrelevant to all of them.
max           the same by the largest score instead of the rank.
mixture       the dimensions' statistics are averaged, weighted, and scored as one corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from cusprun.importance.criterion import Criterion, LayerMatrices
from cusprun.moments import LayerStatistics

Combine = Literal["intersection", "mixture", "max"]


@dataclass(frozen=True)
class UnitScores:
    """One layer's units of one kind."""

    order: torch.Tensor  # (units,) indices, the least needed first
    change: torch.Tensor  # (units,) float64, the score where it is largest over the dimensions; Cus-Prun's is a change

    def last(self, count: int) -> tuple[int, ...]:
        """The ``count`` most needed units, ascending."""
        return tuple(sorted(self.order[len(self.order) - count :].tolist()))


@dataclass(frozen=True)
class LayerScores:
    """One layer's units after combination."""

    ffn: UnitScores
    attention: UnitScores


def combine_layer(
    seen: Mapping[str, LayerStatistics],
    matrices: LayerMatrices,
    criterion: Criterion,
    combine: Combine,
    weights: Mapping[str, float],
) -> LayerScores:
    """Scores one layer on each dimension's statistics and combines them.

    ``weights`` count in ``mixture`` alone; a dimension without one counts 1.
    """
    if combine == "mixture":
        importances = [criterion.score(mix(seen, weights), matrices)]
    else:
        importances = [criterion.score(part, matrices) for part in seen.values()]
    by_rank = combine == "intersection"
    return LayerScores(
        ffn=_combine([importance.ffn for importance in importances], by_rank),
        attention=_combine([importance.attention for importance in importances], by_rank),
    )


def _combine(scores: list[torch.Tensor], by_rank: bool) -> UnitScores:
    """Stable: equal units keep their index order, so the same scores always give the same cut."""
    stacked = torch.stack(scores)  # (dimensions, units)
    change = stacked.amax(0)
    if not by_rank:
        return UnitScores(order=torch.argsort(change, stable=True), change=change)
    ranks = torch.argsort(torch.argsort(stacked, dim=1, stable=True), dim=1, stable=True).amax(0)
    by_change = torch.argsort(change, stable=True)  # ties in rank go to the smaller change
    return UnitScores(order=by_change[torch.argsort(ranks[by_change], stable=True)], change=change)


def mix(seen: Mapping[str, LayerStatistics], weights: Mapping[str, float]) -> LayerStatistics:
    """The weighted sum of the dimensions' means per token, as statistics of one corpus; without a weight one counts 1.

    Gradients are summed alike, per sample. LLM-Pruner's element1 and mix take absolute values within each dimension.
    """
    total: LayerStatistics | None = None
    for name, part in seen.items():
        scaled = part.scaled(weights.get(name, 1.0))
        total = scaled if total is None else total + scaled
    if total is None:
        raise ValueError("no dimension to mix")
    return total
