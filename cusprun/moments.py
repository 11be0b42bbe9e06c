"""What is kept of the text that passed through a layer: sums with counts, so that those of two shards add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from cusprun.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# relative: moments of inputs over ‖layer output‖; plain: moments of the inputs; gradients: of the loss by the weights.
Need = Literal["relative", "plain", "gradients"]
NEEDS: tuple[Need, ...] = ("relative", "plain", "gradients")
RELATIVE: tuple[Need, ...] = ("relative",)  # what Cus-Prun needs

VARIANTS = ("element1", "element2", "mix")  # LLM-Pruner's element-wise importances, in the order they are kept in


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of a vector x and of its products, within blocks of neighbouring entries.

    ``first`` is Σ x, (n,); ``second`` is Σ x xᵀ, (blocks, n/blocks, n/blocks): blocks = n keeps the diagonal only,
    blocks = 1 the whole matrix. Both float64.
    """

    count: float
    first: torch.Tensor
    second: torch.Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.first + other.first, self.second + other.second)

    @classmethod
    def of(cls, x: torch.Tensor, blocks: int) -> Moments:
        """Moments of the rows of ``x``, (tokens, n). One call sums in float32, as its matrix products do; calls add up
        in float64.
        """
        tokens, n = x.shape
        if blocks == n:
            second = x.square().sum(0).reshape(n, 1, 1)
        else:
            pieces = x.reshape(tokens, blocks, n // blocks).transpose(0, 1)  # (blocks, tokens, n/blocks)
            second = pieces.transpose(1, 2) @ pieces
        return cls(tokens, x.sum(0).cpu().double(), second.cpu().double())

    def diagonal(self) -> torch.Tensor:
        """Σ x², (n,)."""
        return self.second.diagonal(dim1=1, dim2=2).reshape(-1)

    def mean(self) -> torch.Tensor:
        """E[x], (n,)."""
        return self.first / self.count

    def variance(self) -> torch.Tensor:
        """E[x²] - E[x]², (n,)."""
        return (self.diagonal() / self.count - self.mean().square()).clamp_min(0)

    def scaled(self, weight: float) -> Moments:
        """The same means counted as ``weight`` tokens."""
        scale = weight / self.count
        return Moments(weight, self.first * scale, self.second * scale)


@dataclass(frozen=True)
class UnitMoments:
    """Moments of what one layer's two output matrices read."""

    ffn: Moments  # inputs of down_proj: the channels, diagonal
    attention: Moments  # inputs of o_proj: in blocks of a kv group, or the diagonal

    def __add__(self, other: UnitMoments) -> UnitMoments:
        return UnitMoments(self.ffn + other.ffn, self.attention + other.attention)

    def scaled(self, weight: float) -> UnitMoments:
        return UnitMoments(self.ffn.scaled(weight), self.attention.scaled(weight))


@dataclass(frozen=True)
class GradientSums:
    """LLM-Pruner's sums for one layer's coupled groups, ``count`` samples' worth.

    With w a weight, G the sum of its loss gradients over the samples and F the sum of their squares, ``ffn`` and
    ``attention`` hold per unit the sums of VARIANTS over all weights of its group: Σ|w G|, Σ|w² F|, Σ|w G - ½ w² F|.
    ``ffn_vectors`` and ``attention_vectors`` hold Σ w G over each row or column of the group, signed. All float64.
    Adding shards is exact for vectors and element2; of the other two the sum is that of the shards' own values, at
    least the whole's.
    """

    count: float
    ffn: torch.Tensor  # (3, channels)
    attention: torch.Tensor  # (3, kv groups)
    ffn_vectors: torch.Tensor  # (channels, 3): row of gate and up, column of down
    attention_vectors: torch.Tensor  # (kv groups, rows and columns): rows of q, k and v, columns of o

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ffn, self.attention, self.ffn_vectors, self.attention_vectors

    def __add__(self, other: GradientSums) -> GradientSums:
        summed = (mine + theirs for mine, theirs in zip(self._tensors(), other._tensors(), strict=True))
        return GradientSums(self.count + other.count, *summed)

    def scaled(self, weight: float) -> GradientSums:
        """The same means counted as ``weight`` samples."""
        return GradientSums(weight, *(tensor * (weight / self.count) for tensor in self._tensors()))


@dataclass(frozen=True)
class LayerStatistics:
    """What one decoder layer did on one dimension's text: the parts that were asked for, None for the others."""

    relative: UnitMoments | None = None  # of inputs over ‖layer output‖ at their token; attention a block a kv group
    plain: UnitMoments | None = None  # of the inputs as they are, diagonal
    gradients: GradientSums | None = None

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(
            _sum(self.relative, other.relative), _sum(self.plain, other.plain), _sum(self.gradients, other.gradients)
        )

    def scaled(self, weight: float) -> LayerStatistics:
        """The same means counted as ``weight`` tokens, or samples."""
        return LayerStatistics(
            self.relative and self.relative.scaled(weight),
            self.plain and self.plain.scaled(weight),
            self.gradients and self.gradients.scaled(weight),
        )

    @property
    def ffn(self) -> Moments:
        """Relative moments of the inputs of down_proj."""
        return asked(self.relative, "relative").ffn

    @property
    def attention(self) -> Moments:
        """Relative moments of the inputs of o_proj."""
        return asked(self.relative, "relative").attention


# One entry a layer, from dimension to what was seen on its text.
Statistics = Sequence[Mapping[str, LayerStatistics]]


def asked(part: T | None, need: Need) -> T:
    """``part`` of the statistics. Raises InvalidRequest where it was not collected."""
    if part is None:
        raise InvalidRequest(f"these statistics hold nothing {need}: collect them with needs={{{need!r}}} among others")
    return part


def _sum(mine: T | None, theirs: T | None) -> T | None:
    if (mine is None) != (theirs is None):
        raise ValueError("statistics with different parts cannot be added")
    return None if mine is None else mine + theirs  # type: ignore[operator]
