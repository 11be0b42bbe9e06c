"""The expert that loses least within what a device allows.

For every type that may be chosen there are tables of what widths and rows cost (:mod:`cusprun.additive`), and what
rounding to the type loses by itself; the integer program is solved for each, and the least loss in sum wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from cusprun.additive import Table
from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.budget import Budget, show_wish
from cusprun.errors import InvalidRequest
from cusprun.program import Choice, Infeasible, Range, nearest, solve, sums
from cusprun.progress import say
from cusprun.sensitivity import LayerSensitivity
from cusprun.widths import Offers, RowsChoice, Widths

CLOSE = 0.003  # of the file's size may stay unused
TIE = 1e-3  # nats a token, for all of a model
TRIES = 5  # that a file's size is brought to what was wished


@dataclass(frozen=True)
class TypeOffer:
    """One type that the expert may be written in."""

    quant: str
    rounding: Callable[[], float]  # measures the nats a token that rounding to it adds; asked for if it may matter
    size: Table  # bytes
    seconds: Table | None = None  # of a decoded token
    memory: Table | None = None  # bytes, peak of the process

    def amounts(self, budget: Budget) -> list[tuple[Table, float]]:
        """What is bounded, and the bounds."""
        found: list[tuple[Table, float]] = []
        if budget.size is not None:
            found.append((self.size, budget.size))
        if budget.ram is not None:
            assert self.memory is not None
            found.append((self.memory, budget.ram))
        if budget.speedup is not None or budget.tps is not None:
            assert self.seconds is not None
            wanted = [1 / budget.tps] if budget.tps is not None else []
            wanted += [self.seconds.whole / budget.speedup] if budget.speedup is not None else []
            found.append((self.seconds, min(wanted)))
        return found

    def expected(self, dense: Anatomy, widths: Widths) -> dict[str, float]:
        """What the tables say of an expert, in the names of a report."""
        rows = dense.vocab_size if widths.rows is None else widths.rows
        found = {"file_bytes": self.size.total(dense, widths.layers, rows)}
        if self.memory is not None:
            found["peak_rss_bytes"] = self.memory.total(dense, widths.layers, rows)
        if self.seconds is not None:
            seconds = self.seconds.total(dense, widths.layers, rows)
            found |= {"decode_tps": 1 / seconds, "speedup": self.seconds.whole / seconds}
        return found


@dataclass(frozen=True)
class Solved:
    """The expert that loses least within a budget."""

    quant: str
    widths: Widths
    rounding: float  # nats a token that the type adds, on top of widths.predicted
    expected: dict[str, float]  # file_bytes, and where the device was measured decode_tps, speedup, peak_rss_bytes

    @property
    def loss(self) -> float:
        """Nats a token that are expected to be lost."""
        return self.widths.predicted + self.rounding


def solve_budget(
    anatomy: Anatomy,
    sensitivities: Sequence[LayerSensitivity],
    budget: Budget,
    offers: Sequence[TypeOffer],
    *,
    align: int,
    uniform: bool = False,
    rows: Sequence[RowsChoice] = (),
    measure_bytes: Callable[[str, Widths], int] | None = None,
) -> Solved:
    """The type, widths and rows that meet the budget at the least loss.

    ``measure_bytes`` gives the exact size of an expert's file: where the tables' is off, the program is solved again
    with what they were off by. Raises InvalidRequest with the nearest that can be had where nothing meets the budget.
    """
    choices = Offers(anatomy, sensitivities, align=align, uniform=uniform, rows=rows)
    found: list[tuple[TypeOffer, Widths, dict[str, float]]] = []
    for offer in offers:
        with suppress(Infeasible):
            found.append((offer, *_exactly(anatomy, choices, budget, offer, measure_bytes)))
    if not found:
        raise InvalidRequest(_nothing_meets(anatomy, choices, budget, offers, measure_bytes))
    best: Solved | None = None
    for offer, widths, expected in sorted(found, key=lambda one: one[1].predicted):
        if best is not None and widths.predicted >= best.loss:
            break  # rounding adds to it, so that none of the others can be better
        solved = Solved(offer.quant, widths, offer.rounding(), expected)
        say(f"{offer.quant}: {widths.predicted:.3f} nats for the cut, {solved.rounding:.3f} for rounding")
        best = solved if best is None or solved.loss < best.loss else best
    assert best is not None
    return best


def _exactly(
    anatomy: Anatomy,
    choices: Offers,
    budget: Budget,
    offer: TypeOffer,
    measure_bytes: Callable[[str, Widths], int] | None,
) -> tuple[Widths, dict[str, float]]:
    """The best in one type with what is expected of it; raises Infeasible.

    Of several tries the best one whose file is no larger than was wished.
    """
    best: tuple[Widths, dict[str, float]] | None = None
    for _ in range(TRIES):
        groups, ranges = _program(anatomy, choices, budget, offer)
        try:
            widths = choices.widths(solve(groups, ranges))
        except Infeasible:
            break
        expected = offer.expected(anatomy, widths)
        if measure_bytes is None:
            return widths, expected
        exact = measure_bytes(offer.quant, widths)
        off = exact - expected["file_bytes"]
        fits = budget.size is None or exact <= budget.size
        if fits and (best is None or widths.predicted < best[0].predicted):
            best = widths, {**expected, "file_bytes": exact}
        if fits and (budget.size is None or abs(off) <= CLOSE * exact or widths.predicted == 0):
            break
        offer = replace(offer, size=replace(offer.size, whole=offer.size.whole + off))
    if best is None:
        raise Infeasible
    return best


def _program(
    anatomy: Anatomy, choices: Offers, budget: Budget, offer: TypeOffer
) -> tuple[list[list[Choice]], list[Range]]:
    """Groups and ranges of :mod:`cusprun.program`: amounts are those of the whole model, each group with its share."""
    bounded = offer.amounts(budget)
    count = len(choices.options) + bool(choices.rows)
    layers = len(anatomy.layers) if choices.uniform else 1

    def of_layer(index: int, widths: LayerWidths | None) -> tuple[float, ...]:
        share = count * layers
        return tuple(table.whole / share - table.of_layer(anatomy.layers[index], widths) for table, _ in bounded)

    def of_rows(rows: int) -> tuple[float, ...]:
        return tuple(table.whole / count - table.of_rows(anatomy.vocab_size, rows) for table, _ in bounded)

    ranges = [Range(-math.inf, bound) for _, bound in bounded]
    return [_keeping(group, bounded[0][0].whole) for group in choices.priced(of_layer, of_rows)], ranges


def _keeping(group: Sequence[Choice], whole: float) -> list[Choice]:
    """The same with a little added to the loss of what takes more away: of equal losses the widest choice wins."""
    most = max(choice.amounts[0] for choice in group)
    return [Choice(one.loss + TIE * (most - one.amounts[0]) / whole, one.amounts) for one in group]


def _nothing_meets(
    anatomy: Anatomy,
    choices: Offers,
    budget: Budget,
    offers: Sequence[TypeOffer],
    measure_bytes: Callable[[str, Widths], int] | None,
) -> str:
    """What was wished, the nearest of it together, and the limit of each wish alone."""

    def expected(offer: TypeOffer, chosen: Sequence[int]) -> dict[str, float]:
        """With a size that the file and the tables both keep to, so that it can be had when it is asked for."""
        widths = choices.widths(chosen)
        found = offer.expected(anatomy, widths)
        if budget.size is not None and measure_bytes is not None:
            found["file_bytes"] = max(found["file_bytes"], measure_bytes(offer.quant, widths))
        return found

    best: tuple[float, str] | None = None
    for offer in offers:
        groups, ranges = _program(anatomy, choices, budget, offer)
        chosen = nearest(groups, ranges)
        over = sum(max(0.0, got / bound.high - 1) for got, bound in zip(sums(groups, chosen), ranges, strict=True))
        offered = _offered(budget, expected(offer, chosen))
        if best is None or over < best[0]:
            best = over, f"{offered} in {offer.quant}"
    assert best is not None
    said = f"no expert of this model meets {budget.words()}; the nearest is {best[1]}"
    alone = [(name, value) for name, value in asdict(budget).items() if value is not None]
    if len(alone) > 1:
        limits = []
        for name, value in alone:
            single = Budget(**{name: value})
            reached = []
            for offer in offers:
                groups, _ = _program(anatomy, choices, single, offer)
                least = [min(range(len(group)), key=lambda at: group[at].amounts[0]) for group in groups]
                reached.append(expected(offer, least))
            limits.append(_offered(single, _utmost(name, reached)))
        said += f"; by itself each reaches {', '.join(limits)}"
    return said


def _utmost(name: str, reached: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    key = REPORTED[name]
    return (min if name in ("size", "ram") else max)(reached, key=lambda one: one[key])


REPORTED = {"size": "file_bytes", "ram": "peak_rss_bytes", "speedup": "speedup", "tps": "decode_tps"}


def _offered(budget: Budget, expected: Mapping[str, float]) -> str:
    """The wishes of ``budget`` as they can be had, on the safe side of rounding."""
    return " ".join(
        f"--{name} {show_wish(name, expected[REPORTED[name]], up=name in ('size', 'ram'))}"
        for name, value in asdict(budget).items()
        if value is not None
    )


class Device(Protocol):
    """Who knows what types, widths and rows cost, and how large a file will be."""

    def key(self) -> str:
        """Hash of what the offers depend on beside the model and the text."""
        ...

    def offers(self) -> list[TypeOffer]: ...

    def file_bytes(self, quant: str, layers: Sequence[LayerWidths | None], kept: Sequence[int] | None) -> int:
        """Bytes of an expert's file; ``kept`` are the tokens that stay, None for all."""
        ...


def as_words(expected: Mapping[str, Any]) -> str:
    """Expected figures for a terminal: 59.8 MB, 112 tokens/s (1.52 x), 290 MB of memory."""
    words = [f"{expected['file_bytes'] / 1e6:.1f} MB"]
    if "decode_tps" in expected:
        words.append(f"{expected['decode_tps']:.3g} tokens/s ({expected['speedup']:.2f} × dense)")
    if "peak_rss_bytes" in expected:
        words.append(f"{expected['peak_rss_bytes'] / 1e6:.0f} MB of memory")
    return ", ".join(words)
