"""What a criterion is given for one layer and what it returns; it knows of no files, devices or exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from cusprun.moments import LayerStatistics, Need

# cus-prun: the least change per parameter, within bounds. even: the same share in every layer and kind. global: one cut
# over all units, whose scores compare across layers. middle: even, but the first and last layers stay whole.
Allocation = Literal["cus-prun", "even", "global", "middle"]


@dataclass(frozen=True)
class LayerMatrices:
    """The matrices of one layer that read the neurons."""

    down: torch.Tensor  # (hidden, channels)
    output: torch.Tensor  # o_proj, (hidden, query heads * head_dim)
    kv_heads: int = 0  # kv groups that the columns of o_proj fall into; 0 where it was not told
    layer: int = 0  # number of the layer in its model

    def groups(self) -> int:
        """Number of kv groups. Raises ValueError where it was not told."""
        if self.kv_heads < 1:
            raise ValueError("LayerMatrices.kv_heads is needed to score kv groups")
        return self.kv_heads

    def sum_groups(self, columns: torch.Tensor) -> torch.Tensor:
        """Sums a value per column of o_proj over the columns of each kv group: (columns,) -> (groups,)."""
        return columns.reshape(self.groups(), -1).sum(1)


@dataclass(frozen=True)
class LayerImportance:
    """A score for each unit of one layer; the larger, the more its removal changes."""

    ffn: torch.Tensor  # (channels,) float64
    attention: torch.Tensor  # (kv groups,) float64


@dataclass(frozen=True)
class Criterion:
    """A named way to score the units of one layer on one dimension's text, with where its paper cuts by the scores."""

    name: str
    paper: str
    score: Callable[[LayerStatistics, LayerMatrices], LayerImportance]
    needs: frozenset[Need] = frozenset({"relative"})  # parts of the statistics that ``score`` reads
    allocation: Allocation = "cus-prun"
    compensates: bool = False  # the mean of what goes becomes a bias of o_proj and down_proj
