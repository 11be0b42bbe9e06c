"""What a model costs as a sum over its parts: a table by kind of layer and width, read off a few measured models.

Bytes of a file, seconds of a token and peak memory are sums over layers and rows of the vocabulary, nearly: each is
measured on the dense model and on variants of it that are narrower in one way, and the differences, by layer, are
interpolated. That is what the integer program adds up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from cusprun.anatomy import Anatomy, LayerWidths

WHOLE, FEWER_LAYERS, FEWER_ROWS = "whole", "layers", "rows"
FFN_SHARES = (0.5, 0.2)  # of the channels, in every layer
HEAD_SHARES = (0.5, 0.0)  # of the kv heads; 0 stands for one
ROW_SHARE = 0.25

Points = tuple[tuple[float, float], ...]  # (width, amount), widths descending from the dense model's, amounts from 0


def variants(
    anatomy: Anatomy, *, align: int, attention_goes: bool, rows: int, linear: bool = False
) -> dict[str, Anatomy]:
    """The dense model by the name WHOLE, and narrower ones: less FFN, fewer kv heads, layers and rows.

    ``rows`` is the size of the vocabulary that FEWER_ROWS has. Where an amount is ``linear`` in the widths, one
    narrower width of each kind tells all.
    """
    layers = anatomy.layers
    found = {WHOLE: anatomy}
    for share in FFN_SHARES[-1:] if linear else FFN_SHARES:
        channels = [max(align, round(share * layer.ffn / align) * align) for layer in layers]
        narrow = [replace(layer, ffn=min(layer.ffn, ffn)) for layer, ffn in zip(layers, channels, strict=True)]
        found[f"ffn {share:g}"] = anatomy.with_layers(narrow)
    for share in HEAD_SHARES[-1:] if linear else HEAD_SHARES:
        found[f"heads {share:g}"] = anatomy.with_layers([_fewer_heads(layer, share) for layer in layers])
    if attention_goes:
        silent = [layers[0], *(replace(layer, heads=0, kv_heads=0) for layer in layers[1:])]
        found["heads none"] = anatomy.with_layers(silent)
    if len(layers) > 1:
        found[FEWER_LAYERS] = anatomy.with_layers([*layers[: (len(layers) + 1) // 2], *[None] * (len(layers) // 2)])
    if rows < anatomy.vocab_size:
        found[FEWER_ROWS] = anatomy.with_vocabulary(rows)
    first = {sizes: name for name, sizes in reversed(found.items())}  # of variants that come to the same the first
    return {name: sizes for name, sizes in found.items() if first[sizes] == name}


def _fewer_heads(layer: LayerWidths, share: float) -> LayerWidths:
    if layer.kv_heads == 0:
        return layer
    kept = max(1, round(share * layer.kv_heads))
    return replace(layer, heads=layer.queries_per_kv * kept, kv_heads=kept)


@dataclass(frozen=True)
class Table:
    """One amount of one model: bytes, seconds, ..."""

    whole: float  # of the dense model
    ffn: Points  # channels of a layer, what they take off
    kv_heads: Points  # kv heads of a layer, what they take off
    layer: float  # that a whole layer takes off
    row: float  # that a row of the vocabulary takes off

    @classmethod
    def of(cls, shapes: Mapping[str, Anatomy], amounts: Mapping[str, float], layers: int | None = None) -> Table:
        """The table of what was measured, by the names of :func:`variants`.

        ``layers`` is how many the dense model has where the measured ones were made of fewer. Differences that come out
        below 0 are taken as 0: a narrower layer costs no more.
        """
        dense, whole = shapes[WHOLE], amounts[WHOLE]
        count = len(dense.layers)

        def points(kind: str, width: str) -> Points:
            found = [(_mean(dense, width), 0.0)]
            for name, sizes in shapes.items():
                if name.startswith(kind):
                    changed = sum(before != after for before, after in zip(dense.layers, sizes.layers, strict=True))
                    least = min(getattr(layer, width) for layer in sizes.layers)
                    at = 0.0 if least == 0 else _mean(sizes, width)
                    found.append((at, max(found[-1][1], (whole - amounts[name]) / changed)))
            return tuple(found)

        def slope(name: str, parts: int) -> float:
            return max(0.0, whole - amounts[name]) / parts if name in amounts else 0.0

        layer = slope(FEWER_LAYERS, count - len(shapes[FEWER_LAYERS].layers) if FEWER_LAYERS in shapes else 1)
        rows = dense.vocab_size - shapes[FEWER_ROWS].vocab_size if FEWER_ROWS in shapes else 1
        return cls(
            whole=whole + ((layers or count) - count) * layer,
            ffn=points("ffn", "ffn"),
            kv_heads=points("heads", "kv_heads"),
            layer=layer,
            row=slope(FEWER_ROWS, rows),
        )

    def of_layer(self, dense: LayerWidths, widths: LayerWidths | None) -> float:
        """What a layer's widths take off; None: the layer goes."""
        if widths is None:
            return self.layer
        ffn = _at(self.ffn, widths.ffn) - _at(self.ffn, dense.ffn)
        return ffn + _at(self.kv_heads, widths.kv_heads) - _at(self.kv_heads, dense.kv_heads)

    def of_rows(self, dense: int, rows: int) -> float:
        """What a vocabulary of ``rows`` takes off."""
        return (dense - rows) * self.row

    def total(self, dense: Anatomy, layers: Sequence[LayerWidths | None], rows: int) -> float:
        """The amount of a model with these widths in the dense model's layers and so many rows."""
        gone = sum(self.of_layer(layer, kept) for layer, kept in zip(dense.layers, layers, strict=True))
        return self.whole - gone - self.of_rows(dense.vocab_size, rows)

    def scaled(self, factor: float) -> Table:
        """The table where every amount is ``factor`` times as large."""

        def times(points: Points) -> Points:
            return tuple((at, factor * amount) for at, amount in points)

        whole, layer, row = (factor * amount for amount in (self.whole, self.layer, self.row))
        return Table(whole, times(self.ffn), times(self.kv_heads), layer, row)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Table:
        points = {name: tuple((at, amount) for at, amount in value[name]) for name in ("ffn", "kv_heads")}
        return cls(value["whole"], points["ffn"], points["kv_heads"], value["layer"], value["row"])


def _mean(sizes: Anatomy, width: str) -> float:
    widths = [getattr(layer, width) for layer in sizes.layers]
    return sum(widths) / len(widths)


def _at(points: Points, width: float) -> float:
    """Linear between the points, and beyond them along the nearest two."""
    if len(points) == 1:
        return 0.0
    ascending = sorted(points)
    place = min(max(bisect_right([at for at, _ in ascending], width), 1), len(ascending) - 1)
    (low, of_low), (high, of_high) = list(pairwise(ascending))[place - 1]
    return of_low + (of_high - of_low) * (width - low) / (high - low)
