"""Where to cut, by measured loss: the widths of every layer, and the vocabulary's rows, that an integer program picks.

Losses between the measured widths are interpolated; a layer's FFN and attention add up, whole layers and whole
attention blocks compete as choices of their own, and so do rows of the vocabulary at their price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.structure import MIN_FFN
from cusprun.errors import InvalidRequest
from cusprun.program import Choice, Infeasible, Range, interpolate, reach, solve, sums
from cusprun.sensitivity import LayerSensitivity

TOLERANCES = (0.0025, 0.01, 0.03)  # of what the dense model weighs; the wider ones for coarse models


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
) -> Widths:
    """The widths that take ``target`` parameters off the dense model at the least sum of losses.

    At most the first of TOLERANCES more than the target goes; less than it only where a model is so coarse that nothing
    comes as near from above. ``uniform`` gives every layer the same widths. Raises InvalidRequest where no widths meet
    the target within the last of TOLERANCES.
    """
    offers = Offers(anatomy, sensitivities, align=align, uniform=uniform, rows=rows)

    def gone(index: int, widths: LayerWidths | None) -> tuple[float]:
        kept = 0 if widths is None else anatomy.layer_parameters(widths)
        return (float(anatomy.layer_parameters(anatomy.layers[index]) - kept),)

    def rows_gone(kept: int) -> tuple[float]:
        return (float(anatomy.parameters - anatomy.with_vocabulary(kept).parameters),)

    return offers.widths(_solve(offers.priced(gone, rows_gone), target, float(anatomy.parameters)))


class Offers:
    """All that may be chosen: pairs of widths for every layer, or one pair for all, and sizes of the vocabulary."""

    def __init__(
        self,
        anatomy: Anatomy,
        sensitivities: Sequence[LayerSensitivity],
        *,
        align: int,
        uniform: bool = False,
        rows: Sequence[RowsChoice] = (),
    ) -> None:
        """Raises InvalidRequest where ``uniform`` is asked of a model whose layers differ."""
        self.anatomy, self.uniform, self.rows = anatomy, uniform, rows
        options = [_layer_options(anatomy, index, layer, align) for index, layer in enumerate(sensitivities)]
        self.options = _merge(anatomy, options) if uniform else options

    def priced(
        self,
        of_layer: Callable[[int, LayerWidths | None], tuple[float, ...]],
        of_rows: Callable[[int], tuple[float, ...]],
    ) -> list[list[Choice]]:
        """Choices with the amounts that a layer's widths, by its number, and the kept rows come to."""
        groups = []
        for index, group in enumerate(self.options):
            places = range(len(self.anatomy.layers)) if self.uniform else (index,)
            groups.append(
                [
                    Choice(loss, tuple(map(sum, zip(*(of_layer(place, widths) for place in places), strict=True))))
                    for widths, loss in group
                ]
            )
        if self.rows:
            groups.append([Choice(row.loss, of_rows(row.rows)) for row in self.rows])
        return groups

    def widths(self, chosen: Sequence[int]) -> Widths:
        """What the choices of :meth:`priced`, by number, stand for."""
        layers = [group[number] for group, number in zip(self.options, chosen, strict=False)]
        row = self.rows[chosen[-1]] if self.rows else None
        predicted = sum(loss for _, loss in layers) + (row.loss if row is not None else 0.0)
        picked = tuple(widths for widths, _ in layers)
        if self.uniform:
            picked *= len(self.anatomy.layers)
        return Widths(picked, None if row is None else row.rows, predicted)


def _solve(offered: Sequence[Sequence[Choice]], target: float, whole: float) -> list[int]:
    for tolerance in (share * whole for share in TOLERANCES):
        for low in (target, target - tolerance):
            with suppress(Infeasible):  # no widths so near to the target
                return _least_loss(offered, low, target + tolerance)
    least, most = reach(offered, 0)
    raise InvalidRequest(
        f"no choice of widths removes {target:,.0f} ± {TOLERANCES[-1] * whole:,.0f}; they remove {least:,.0f} to "
        f"{most:,.0f}"
    )


def _least_loss(offered: Sequence[Sequence[Choice]], low: float, high: float) -> list[int]:
    """The choices that remove from ``low`` to ``high``. Raises Infeasible where none do.

    The least loss is where little more than ``low`` goes, and without the other end far fewer choices are worth while.
    """
    taken = [[Choice(choice.loss, (-choice.amounts[0],)) for choice in group] for group in offered]
    chosen = solve(taken, [Range(-inf, -low)])
    if -sums(taken, chosen)[0] <= high:
        return chosen
    return solve(offered, [Range(low, high)])  # the models are so coarse that the end that is left out binds


Option = tuple[LayerWidths | None, float]


def _layer_options(anatomy: Anatomy, index: int, sensitivity: LayerSensitivity, align: int) -> list[Option]:
    """Every pair of widths that one layer may have, with its loss; the runtimes' limits hold."""
    full = anatomy.layers[index]
    floor = -(-min(MIN_FFN, full.ffn) // align) * align
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
    if sensitivity.dropped is not None:
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
