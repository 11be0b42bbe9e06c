"""The frontier: artifacts by what they cost (bytes, time of a token) and what they lose (bits per byte of one text).

Either as `compare` measured it, or of the figures of several reports that were taken on the same held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cusprun.benchmarks.dominance import AXES, MEMORY, Figures, dominates
from cusprun.benchmarks.report_page.plots import Plot
from cusprun.benchmarks.report_page.reading import Measured
from cusprun.benchmarks.report_page.svg import DENSE, EXPERT, GIVEN, INK, PAPER, as_svg, canvas
from cusprun.benchmarks.tables import Grid
from cusprun.benchmarks.tally import percent

MB = 1e6
MARKS: dict[str, dict[str, Any]] = {
    "dense": {"marker": "s", "color": DENSE, "markerfacecolor": PAPER},
    "expert": {"marker": "o", "color": EXPERT, "markerfacecolor": EXPERT},
    "given": {"marker": "^", "color": GIVEN, "markerfacecolor": PAPER},
}
WIDE = 8.0  # largest over smallest, from which on an axis is logarithmic


@dataclass(frozen=True, eq=False)
class Row:
    """One artifact; ``bits`` are bits per byte by name of the text."""

    name: str
    kind: str  # expert, dense or given
    type: str  # gguf q8_0
    bytes: int
    bits: Mapping[str, float]
    tps: Mapping[str, float] | None  # mean, sd, n of decoding
    rss: int | None
    remark: str = ""
    over: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)  # reference, and standard error
    rounds: Mapping[str, Sequence[float]] = field(default_factory=dict)  # decoding, by the bench they were rounds of

    def figures(self, text: str) -> Figures:
        """What decides who dominates whom."""
        mean = None if self.tps is None else self.tps["mean"]
        return Figures(self.bytes, self.bits.get(text), mean, self.rss, self.rounds)


@dataclass(frozen=True)
class Frontier:
    """Artifacts that were measured on the same text, and the text by which they are drawn."""

    rows: tuple[Row, ...]
    text: str
    verdicts: tuple[str, ...] = ()
    how: str = ""
    marked: tuple[bool, ...] | None = None  # which are dominated, as `compare` found

    def dominating(self, row: Row, memory: bool = True) -> list[Row]:
        """The rows that are no worse than ``row`` in anything measured of both, and better in something.

        Noise does not count (:mod:`cusprun.benchmarks.dominance`), nor memory without ``memory``.
        """
        axes = [axis for axis in AXES if memory or axis != MEMORY]
        own = row.figures(self.text)
        return [other for other in self.rows if other is not row and dominates(other.figures(self.text), own, axes)]

    def dominated(self, row: Row) -> bool:
        """As `compare` says; where it was not asked, whether a row is no worse in anything and better in something."""
        if self.marked is not None:
            return self.marked[self.rows.index(row)]
        return bool(self.dominating(row))


def given_frontier(report: Mapping[str, Any]) -> Frontier | None:
    """The one that a report holds."""
    found = report.get("frontier")
    if not found or not found["rows"]:
        return None
    rows = tuple(
        Row(row["name"], row["kind"], f"{row['format']} {row['quant']}", row["file_bytes"], row["bits_per_byte"],
            row["decode_tps"], row["peak_rss_bytes"], row["remark"], _over(row),
            {"": row.get("samples", {}).get("decode_tps", [])})
        for row in found["rows"]
    )  # fmt: skip
    verdicts = tuple(found.get("verdicts", ()))
    marked = tuple(row["dominated"] for row in found["rows"])
    how = [found["how"]] if found.get("how") else []
    if any(row.tps for row in rows) and not any(row.rounds[""] for row in rows):  # a record of before
        how.append("speeds and memory were compared as they are, noise and all")
    return Frontier(rows, found["text"], verdicts, "; ".join(how), marked)


def _over(row: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    errors = row.get("increase_stderr", {})
    return {text: (share, errors.get(text)) for text, share in row.get("increase", {}).items()}


def own_frontiers(experts: Sequence[Measured]) -> list[tuple[Frontier, dict[int, Row]]]:
    """Frontiers of the reports' own figures, and the row of each expert by its place in ``experts``.

    One for each held-out text that two or more were measured on; a dense file that several were held against is one
    row.
    """
    groups: dict[str, list[int]] = {}
    for index, expert in enumerate(experts):
        key = expert.held_out()
        if key is not None:
            groups.setdefault(key, []).append(index)
    found = []
    for members in groups.values():
        if len(members) > 1:
            text = experts[members[0]].text
            own = {index: _row(experts[index], "expert", [experts[index]]) for index in members}
            dense: dict[tuple[Any, ...], list[Measured]] = {}
            for index in members:
                dense.setdefault(experts[index].dense_key(), []).append(experts[index])
            rows = (*own.values(), *(_row(group[0], "dense", group) for group in dense.values()))
            how = (
                "The figures of these reports; speeds come from separate runs, each expert beside its own dense file, "
                "to which it is held round by round where the rounds were kept; to all others by the mean."
            )
            found.append((Frontier(rows, text, how=how), own))
    return found


def find_row(frontier: Frontier, expert: Measured) -> Row | None:
    """The row of a report's own expert."""
    own = expert.report["speed"]["expert"]
    wanted = ("expert", f"{own['format']} {own['quant']}", own["file_bytes"])
    return next((row for row in frontier.rows if (row.kind, row.type, row.bytes) == wanted), None)


def frontier_plots(frontier: Frontier, prefix: str) -> list[Plot]:
    """Bits per byte over megabytes, and over decoding speed where it was measured."""
    by_size = {row: row.bytes / MB for row in frontier.rows}
    by_speed = {row: row.tps["mean"] for row in frontier.rows if row.tps is not None}
    found = [_draw(frontier, by_size, "size", "file, MB", f"{prefix}-size", lower=True)]
    if len(by_speed) > 1:
        found.append(_draw(frontier, by_speed, "speed", "decode, tokens/s", f"{prefix}-tps", lower=False))
    return [plot for plot in found if plot is not None]


def frontier_table(frontier: Frontier) -> Grid:
    """Every row, numbered as in the plots."""
    texts = list(dict.fromkeys(text for row in frontier.rows for text in row.bits))
    held = [text for text in texts if any(text in row.over for row in frontier.rows)]
    headers = ("no.", "artifact", "kind", "type", "MB", *(f"bits/byte {text}" for text in texts),
               *(f"over reference {text}" for text in held), "decode tok/s",
               "RSS MB", "dominated", "remark")  # fmt: skip
    rows = tuple(
        (
            str(number),
            row.name,
            row.kind,
            row.type,
            f"{row.bytes / MB:.1f}",
            *(f"{row.bits[text]:.4f}" if text in row.bits else "" for text in texts),
            *(percent(*row.over[text]) if text in row.over else "" for text in held),
            "" if row.tps is None else f"{row.tps['mean']:.1f} ± {row.tps['sd']:.1f}",
            "" if row.rss is None else f"{row.rss / MB:.1f}",
            "yes" if frontier.dominated(row) else "no",
            row.remark,
        )
        for number, row in enumerate(frontier.rows, 1)
    )
    return Grid("Artifacts of the frontier", headers, rows)


def _draw(frontier: Frontier, cost: Mapping[Row, float], what: str, label: str, key: str, lower: bool) -> Plot | None:
    """Bits per byte over ``cost``, the front as a step line."""
    points = {row: (x, row.bits[frontier.text]) for row, x in cost.items() if frontier.text in row.bits}
    if len(points) < 2:
        return None
    front = _front(points.values(), lower)
    title = f"Bits per byte ({frontier.text}) over {'megabytes' if lower else 'decoding speed'}"
    with canvas(3.4) as figure:
        axis = figure.subplots()
        axis.step([x for x, _ in front], [y for _, y in front], where="post" if lower else "pre", color=INK,
                  linewidth=1.2, linestyle="--", label="front", zorder=1)  # fmt: skip
        for kind, style in MARKS.items():
            members = [points[row] for row in points if row.kind == kind]
            if members:
                axis.plot(*zip(*members, strict=True), linestyle="none", markersize=8, markeredgewidth=1.8, label=kind,
                          **style)  # fmt: skip
        places: dict[tuple[float, float], list[str]] = {}
        for number, row in enumerate(frontier.rows, 1):
            if row in points:
                places.setdefault(points[row], []).append(str(number))
        for place, numbers in places.items():
            axis.annotate(", ".join(numbers), place, (6, 5), textcoords="offset points", fontsize=10.5)
        xs = [x for x, _ in points.values()]
        if min(xs) > 0 and max(xs) / min(xs) > WIDE:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.12)
        axis.grid()
        axis.set_xlabel(label)
        axis.set_ylabel("bits per byte")
        figure.legend(loc="outside upper left", ncols=4, handletextpad=0.4, columnspacing=1.2)
        told = [
            f"{number} {row.name} ({row.kind}, {row.type}): {points[row][0]:.1f}, {points[row][1]:.3f}"
            for number, row in enumerate(frontier.rows, 1)
            if row in points
        ]
        svg = as_svg(figure, key, title, f"{label}, bits per byte. {'; '.join(told)}.")
    better = "Further left and lower is better" if lower else "Further right and lower is better"
    caption = f"{better}; nothing compared lies beyond the dashed line in these two figures. Numbers as in the table."
    ordered = sorted(points, key=lambda row: points[row])
    table = Grid(
        title,
        ("artifact", "kind", "type", label, "bits/byte", "on this front"),
        tuple(
            (row.name, row.kind, row.type, f"{points[row][0]:.1f}", f"{points[row][1]:.4f}",
             "yes" if points[row] in front else "no")
            for row in ordered
        ),
    )  # fmt: skip
    return Plot(key, title, caption, svg, table)


def _front(points: Iterable[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both, by rising x; ``lower``: less x is better."""
    found: list[tuple[float, float]] = []
    best = math.inf
    for x, y in sorted(points, key=lambda point: (point[0] if lower else -point[0], point[1])):
        if y < best:
            best = y
            found.append((x, y))
    return sorted(found)


def _row(expert: Measured, who: str, group: Sequence[Measured]) -> Row:
    """One side of a report; the runs of several reports of the same dense file are put together."""
    side = expert.report["speed"][who]
    rounds = {
        str(member.path): member.report["speed"][who].get("samples", {}).get("decode_tps", []) for member in group
    }
    runs = [run for found in rounds.values() for run in found]
    tps = side["decode_tps"]
    if len(group) > 1 and len(runs) > 1:
        mean = math.fsum(runs) / len(runs)
        sd = math.sqrt(math.fsum((run - mean) ** 2 for run in runs) / (len(runs) - 1))
        tps = {"mean": mean, "sd": sd, "n": len(runs)}
    bits = {
        text: entry[who]["bits_per_byte"] for text, entry in expert.report["quality"]["corpora"].items() if who in entry
    }
    name = expert.name if who == "expert" else f"{expert.base} (dense)"
    kind = f"{side['format']} {side['quant']}"
    return Row(name, who, kind, side["file_bytes"], bits, tps, side["peak_rss_bytes"], rounds=rounds)
