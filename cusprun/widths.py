"""Where to cut, by measured loss: the widths of every layer, and the vocabulary's rows, that an integer program picks.

Losses between the measured widths are interpolated; a layer's FFN and attention add up, whole layers and whole
attention blocks compete as choices of their own, and so do rows of the vocabulary at their price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.structure import MIN_FFN
from cusprun.errors import InvalidRequest
from cusprun.program import Choice, interpolate, solve
from cusprun.sensitivity import LayerSensitivity

TOLERANCES = (0.0025, 0.01, 0.03)  # of what the dense model weighs, either way; the wider ones for coarse models


@dataclass(frozen=True)
class RowsChoice:
    """One size of the vocabulary."""

    rows: int  # that stay
    loss: float  # nats per token that the others' absence costs


@dataclass(frozen=True)
class Widths:
    """What the program chose."""

    layers: tuple[LayerWidths | None, ...]  # None: the whole layer goes
    rows: int | None  # of the vocabulary; None where no choice of rows was given
    predicted: float  # nats per token added, as the sum of the measured losses


def solve_widths(
    anatomy: Anatomy,
    sensitivities: Sequence[LayerSensitivity],
    target: float,
    *,
    align: int,
    uniform: bool = False,
    rows: Sequence[RowsChoice] = (),
    weigh: Callable[[Anatomy], float] | None = None,
    least: float = 0.0,
) -> Widths:
    """The widths that take ``target`` off what the dense model weighs, at the least sum of losses.

    ``weigh`` gives an anatomy's weight: its parameters unless told otherwise (bytes, or seconds a token); it has to be
    a sum over layers and rows. ``uniform`` gives every layer the same widths. ``least`` is the share of its channels
    that every layer keeps at least. Raises InvalidRequest where no widths meet the target within the last of
    TOLERANCES.
    """
    weigh = weigh or (lambda sizes: float(sizes.parameters))
    options = [
        _layer_options(anatomy, index, sensitivity, align, least) for index, sensitivity in enumerate(sensitivities)
    ]
    if uniform:
        options = _merge(anatomy, options)
    offered = [
        [_priced(anatomy, None if uniform else index, widths, loss, weigh) for widths, loss in group]
        for index, group in enumerate(options)
    ]
    if rows:
        every = weigh(anatomy)
        offered.append([Choice(row.loss, every - weigh(anatomy.with_vocabulary(row.rows))) for row in rows])
    chosen = _solve(offered, target, weigh(anatomy))
    predicted = sum(group[number].loss for group, number in zip(offered, chosen, strict=True))
    kept = rows[chosen.pop()].rows if rows else None
    picked = [group[number][0] for group, number in zip(options, chosen, strict=True)]
    return Widths(tuple(picked * len(anatomy.layers) if uniform else picked), kept, predicted)


def _solve(offered: Sequence[Sequence[Choice]], target: float, whole: float) -> list[int]:
    *narrow, widest = (tolerance * whole for tolerance in TOLERANCES)
    for tolerance in narrow:
        with suppress(InvalidRequest):  # no widths so near to the target
            return solve(offered, target, tolerance)
    return solve(offered, target, widest)


Option = tuple[LayerWidths | None, float]


def _layer_options(
    anatomy: Anatomy, index: int, sensitivity: LayerSensitivity, align: int, least: float
) -> list[Option]:
    """Every pair of widths that one layer may have, with its loss; the runtimes' limits hold."""
    full = anatomy.layers[index]
    floor = max(-(-min(MIN_FFN, full.ffn) // align) * align, least * full.ffn)
    ffn = [width for width in range(full.ffn // align * align, 0, -align) if floor <= width]
    ffn = [full.ffn] + [width for width in ffn if width < full.ffn]
    heads = list(range(full.kv_heads, -1 if 0 in sensitivity.kv_heads else 0, -1))
    ffn_loss = _losses(full.ffn, sensitivity.ffn, ffn)
    head_loss = _losses(full.kv_heads, sensitivity.kv_heads, heads)
    queries = full.heads // full.kv_heads if full.kv_heads else 0
    options: list[Option] = [
        (LayerWidths(width, kv_heads * queries, kv_heads), of_ffn + of_heads)
        for width, of_ffn in ffn_loss.items()
        for kv_heads, of_heads in head_loss.items()
    ]
    if sensitivity.dropped is not None and least == 0:
        options.append((None, sensitivity.dropped))
    return options


def _losses(full: int, measured: dict[int, float], wanted: Sequence[int]) -> dict[int, float]:
    """Loss by width, from the measured widths; a width below the least measured is not offered."""
    levels = [0, *(full - width for width in sorted(measured, reverse=True))]
    if len(levels) == 1:
        return {full: 0.0}
    values = [0.0, *(measured[full - level] for level in levels[1:])]
    inside = [width for width in wanted if full - width <= levels[-1]]
    return dict(zip(inside, map(float, interpolate(levels, values, [full - width for width in inside])), strict=True))


def _merge(anatomy: Anatomy, options: list[list[Option]]) -> list[list[Option]]:
    """One group of the options that every layer has, with the sum of their losses."""
    if not anatomy.uniform:
        raise InvalidRequest(
            "--layout uniform needs a model whose layers are alike; this one's differ: --layout per-layer"
        )
    divides = anatomy.family.heads_divide_hidden
    tables = [dict(group) for group in options]
    shared = [
        widths
        for widths, _ in options[0]
        if widths is not None and widths.heads and not (divides and anatomy.hidden_size % widths.heads)
    ]
    return [[(widths, sum(table[widths] for table in tables)) for widths in shared]]


def _priced(
    anatomy: Anatomy, index: int | None, widths: LayerWidths | None, loss: float, weigh: Callable[[Anatomy], float]
) -> Choice:
    """A choice with what it takes off: of the layer ``index``, or of all alike where that is None."""
    layers = [widths if index in (None, place) else layer for place, layer in enumerate(anatomy.layers)]
    smaller = anatomy.with_layers(layers)
    return Choice(loss, weigh(anatomy) - weigh(smaller))
