"""What a criterion is given for one layer and what it returns; it knows of no files, devices or exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cusprun.statistics import LayerStatistics


@dataclass(frozen=True)
class LayerMatrices:
    """The matrices of one layer that read the neurons."""

    down: torch.Tensor  # (hidden, channels)
    output: torch.Tensor  # o_proj, (hidden, query heads * head_dim)


@dataclass(frozen=True)
class LayerImportance:
    """A score for each unit of one layer; the larger, the more its removal changes."""

    ffn: torch.Tensor  # (channels,) float64
    attention: torch.Tensor  # (kv groups,) float64


@dataclass(frozen=True)
class Criterion:
    """A named way to score the units of one layer on one dimension's text."""

    name: str
    paper: str
    score: Callable[[LayerStatistics, LayerMatrices], LayerImportance]
