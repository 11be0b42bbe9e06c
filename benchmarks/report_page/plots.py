"""The plots of one expert's report, each with the table of its numbers; None where the report has nothing to draw.

Dense and expert differ by shape as well as by colour: dense is a hollow square, the expert a full circle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from cusprun.benchmarks.report_page.intervals import bits_interval, mean_interval
from cusprun.benchmarks.report_page.svg import DENSE, EXPERT, INK, PAPER, as_svg, canvas
from cusprun.benchmarks.tables import Grid, increase_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_LABEL = 14  # characters
SIDES = ("dense", "expert")
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"marker": "s", "color": DENSE, "markerfacecolor": PAPER},
    "expert": {"marker": "o", "color": EXPERT, "markerfacecolor": EXPERT},
}
SPEEDS = {"decode_tps": "decode, tokens/s", "prefill_tps": "prefill, tokens/s"}
KINDS = {"ffn": "FFN channels", "heads": "query heads", "kv_heads": "kv groups"}


@dataclass(frozen=True)
class Plot:
    """A figure of the page: ``key`` is unique on it, ``table`` holds the same numbers."""

    key: str
    title: str
    caption: str
    svg: Markup
    table: Grid


def plots(report: Mapping[str, Any], prefix: str) -> dict[str, Plot]:
    """By name: speed, quality, answers, widths, as far as there is data."""
    found = {
        "speed": speed_plot(report["speed"], f"{prefix}-speed"),
        "quality": quality_plot(report["quality"]["corpora"], f"{prefix}-quality"),
        "answers": answers_plot(report["tasks"]["sets"], f"{prefix}-answers"),
        "widths": widths_plot(report["layers"], f"{prefix}-widths"),
    }
    return {name: plot for name, plot in found.items() if plot is not None}


def speed_plot(speed: Mapping[str, Any], key: str) -> Plot:
    """Every run as a point, the mean with its 95 % interval, for decoding and prefill."""
    rows, told = [], []
    with canvas(2.9) as figure:
        for axis, (name, label) in zip(figure.subplots(2, 1), SPEEDS.items(), strict=True):
            highest = 0.0
            for place, who in enumerate(SIDES):
                runs = speed[who].get("samples", {}).get(name, [])
                mean, interval = speed[who][name]["mean"], mean_interval(runs)
                if interval is not None:  # records of old have no wider one for runs that hang together
                    interval = speed[who][name].get("ci95") or interval
                _point(axis, mean, 1 - place, interval, who)
                axis.plot(runs, [1 - place - 0.25] * len(runs), "|", color=STYLES[who]["color"], markersize=6)
                highest = max([highest, mean, *runs, *(interval or ())])
                shown = _between(interval, ".1f")
                rows.append((label, who, f"{mean:.1f}", shown, "  ".join(f"{run:.1f}" for run in runs)))
                told.append(f"{who} {label.split(',')[0]} {mean:.1f} tokens/s{f' ({shown})' if shown else ''}")
            _sides(axis, 1.08 * highest)
            axis.set_title(label)
        title = "Speed of dense and expert"
        svg = as_svg(figure, key, title, "; ".join(told) + ".")
    caption = (
        "Marker: mean; line: 95 % interval of the mean (with three runs or more); ticks below: every run. "
        "Dense and expert ran in alternation. Higher is better."
    )
    table = Grid(title, ("speed", "artifact", "mean", "95 % interval", "runs"), tuple(rows))
    return Plot(key, title, caption, svg, table)


def quality_plot(corpora: Mapping[str, Mapping[str, Any]], key: str) -> Plot | None:
    """Bits per byte of each held-out text."""
    if not corpora:
        return None
    rows, told = [], []
    with canvas(0.9 + 0.62 * len(corpora)) as figure:
        axis = figure.subplots()
        for place, (name, entry) in enumerate(corpora.items()):
            for who in (side for side in SIDES if side in entry):
                quality, offset = entry[who], 0.17 if who == "dense" else -0.17
                interval = bits_interval(quality)
                label = who if place == 0 else None
                _point(axis, quality["bits_per_byte"], -place + offset, interval, who, label)
                more = increase_of(entry) if who == "expert" and "dense" in entry else ""
                if more:
                    reach = interval[1] if interval else quality["bits_per_byte"]
                    axis.annotate(more, (reach, -place + offset), (6, 0), textcoords="offset points", va="center")
                rows.append((name, who, f"{quality['bits_per_byte']:.4f}", _between(interval, ".4f"), more))
                told.append(f"{name}, {who}: {quality['bits_per_byte']:.3f}{f', {more}' if more else ''}")
        axis.set_yticks([-place for place in range(len(corpora))], [_short(name) for name in corpora])
        axis.set_ylim(-len(corpora) + 0.45, 0.55)
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 1.2 * axis.get_xlim()[1])
        axis.grid(axis="x")
        axis.set_xlabel("bits per byte of held-out text")
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.3)
        title = "Loss by text"
        svg = as_svg(figure, key, title, "; ".join(told) + ".")
    caption = (
        "Lower is better; the percentage is the expert's increase over dense on the same bytes, ± its standard error, "
        "paired by window. Line: 95 % interval from each artifact's own losses, tokens taken as independent: intervals "
        "that overlap do not mean that there is no difference."
    )
    table = Grid(title, ("text", "artifact", "bits/byte", "95 % interval", "over dense"), tuple(rows))
    return Plot(key, title, caption, svg, table)


def answers_plot(sets: Mapping[str, Mapping[str, Any]], key: str) -> Plot | None:
    """Multiple choice with Wilson intervals beside the score of a constant answer."""
    if not sets:
        return None
    labels: list[str] = []
    rows, told = [], []
    with canvas(0.9 + 0.62 * 2 * len(sets)) as figure:
        axis = figure.subplots()
        for name, entry in sets.items():
            for suffix, how in (("", "plain"), ("_normalised", "per byte")):
                place = -len(labels)
                labels.append(how if len(sets) == 1 else f"{_short(name)}, {how}")
                constant = 100 * entry["expert"]["constant_answer_accuracy"]
                axis.plot([constant] * 2, [place - 0.4, place + 0.4], "--", color=INK, linewidth=1.2,
                          label="constant answer" if place == 0 else None)  # fmt: skip
                for who in SIDES:
                    result, offset = entry[who], 0.17 if who == "dense" else -0.17
                    low, high = (100 * bound for bound in result["interval" + suffix])
                    right = 100 * result["accuracy" + suffix]
                    _point(axis, right, place + offset, (low, high), who, who if place == 0 else None)
                    rows.append((name, how, who, f"{right:.1f} %", f"{low:.1f} to {high:.1f} %", f"{constant:.1f} %"))
                    told.append(f"{how}, {who}: {right:.1f} %, 95 % interval {low:.0f} to {high:.0f} %")
        axis.set_yticks([-place for place in range(len(labels))], labels)
        axis.set_ylim(-len(labels) + 0.45, 0.55)
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 100)
        axis.grid(axis="x")
        axis.set_xlabel("questions answered right, %")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.3, columnspacing=1.2)
        title = "Multiple choice"
        svg = as_svg(figure, key, title, "; ".join(told) + f"; a constant answer: {rows[0][5]}.")
    caption = "Line: Wilson's 95 % interval. Dashed: the score of always giving the answer that is right most often."
    headers = ("questions", "scored", "artifact", "right", "95 % interval", "constant answer")
    return Plot(key, title, caption, svg, Grid(title, headers, tuple(rows)))


def widths_plot(layers: Sequence[Mapping[str, Any]], key: str) -> Plot | None:
    """What is left of every layer: a panel for each kind that does not merely repeat another."""
    if not layers:
        return None
    kinds = [kind for kind in KINDS if kind != "kv_heads" or not _same_shares(layers, "heads", "kv_heads")]
    title = "Widths by layer"
    told = []
    with canvas(0.5 + 1.25 * len(kinds)) as figure:
        axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        places = [layer["layer"] for layer in layers]
        for axis, kind in zip(axes, kinds, strict=True):
            before = [layer[kind]["before"] for layer in layers]
            after = [layer[kind]["after"] for layer in layers]
            axis.bar(places, before, width=0.84, facecolor="none", edgecolor=DENSE, linewidth=0.9)
            axis.bar(places, after, width=0.84, color=EXPERT)
            left = f"{sum(after):,} of {sum(before):,} {KINDS[kind]} left"
            axis.set_title(left)
            axis.set_ylim(0, 1.05 * max([*before, 1]))
            axis.locator_params(axis="y", nbins=4, integer=True)
            told.append(f"{left} ({sum(after) / max(1, sum(before)):.0%})")
        axes[-1].set_xlabel("layer")
        axes[-1].locator_params(axis="x", integer=True)
        svg = as_svg(figure, key, title, "; ".join(told) + ".")
    rows = [
        (str(layer["layer"]), *(f"{layer[kind]['before']} → {layer[kind]['after']}" for kind in KINDS))
        for layer in layers
    ]
    caption = (
        "Outline: dense; full: what the expert kept. A layer without a full bar in any panel went whole, one without "
        "heads lost its attention."
    )
    return Plot(key, title, caption, svg, Grid(title, ("layer", *KINDS.values()), tuple(rows)))


def _same_shares(layers: Sequence[Mapping[str, Any]], one: str, other: str) -> bool:
    return all(
        layer[one]["after"] * layer[other]["before"] == layer[other]["after"] * layer[one]["before"] for layer in layers
    )


def _point(
    axis: Axes, x: float, y: float, interval: tuple[float, float] | None, who: str, label: str | None = None
) -> None:
    style = STYLES[who]
    if interval is not None:
        axis.plot(interval, [y, y], "-", color=style["color"], linewidth=2, solid_capstyle="butt")
    axis.plot([x], [y], linestyle="none", markersize=7.5, markeredgewidth=1.8, label=label, **style)


def _sides(axis: Axes, highest: float) -> None:
    axis.set_yticks([1, 0], list(SIDES))
    axis.set_ylim(-0.6, 1.5)
    axis.set_xlim(0, highest or 1)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def _short(name: str) -> str:
    """A label that leaves room for the plot."""
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


def _between(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
