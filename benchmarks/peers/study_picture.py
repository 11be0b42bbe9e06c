"""The pictures of studies: curves over a number, or bars beside each other; one panel a scenario and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cusprun.benchmarks.peers.study_page import ASIDE, Picture, Row, show, texts_of

PANELS = 3  # texts shown beside each other
TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # %, where the axis is logarithmic
AXES = {"removed": "share of parameters removed", "tokens": "calibration tokens"}
WIDEST = 400.0  # % increase; what lies above is cut off, so that the rest can be seen


def curves(
    x: str, series: Sequence[str], *, log_x: bool = False, log_y: bool = False,
    only: Callable[[Row], bool] = lambda row: True,
) -> Picture:  # fmt: skip
    """Increase in % over the label ``x`` (or an attribute of the row), a line for each value of ``series``."""

    def draw(rows: Sequence[Row], path: Path) -> None:
        from matplotlib.ticker import NullLocator

        def panel(axis: Any, members: Sequence[Row], text: str) -> None:
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in members:
                value, increase = row[x] if x in row.labels else getattr(row, x), row.increase(text)
                if value is not None and increase is not None:
                    name = ", ".join(show(label, row[label]) for label in series if row[label] is not None)
                    lines.setdefault(name, []).append((float(value), 100 * increase))
            for number, (name, points) in enumerate(lines.items()):
                points.sort()
                style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name, **style)
            axis.set_xlabel(AXES.get(x, x))
            if log_x:
                axis.set_xscale("log", base=2 if x == "tokens" else 10)
            if log_y:
                axis.set_yscale("symlog", linthresh=1)
                axis.set_yticks([tick for tick in TICKS if tick <= 1.5 * axis.get_ylim()[1]])
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            elif axis.get_ylim()[1] > WIDEST:
                axis.set_ylim(top=WIDEST)

        _panels(rows, path, panel, only)

    return draw


def bars(names: Sequence[str], *, only: Callable[[Row], bool] = lambda row: True) -> Picture:
    """Increase in % as one horizontal bar a row, named by its labels ``names``."""

    def draw(rows: Sequence[Row], path: Path) -> None:
        def panel(axis: Any, members: Sequence[Row], text: str) -> None:
            shown = [(row, increase) for row in members if (increase := row.increase(text)) is not None]
            labels = [", ".join(show(name, row[name]) for name in names if row[name] is not None) for row, _ in shown]
            values = [100 * increase for _, increase in shown]
            places = range(len(shown))
            axis.barh(places, values, color=[f"C{_order(row, members, names) % 10}" for row, _ in shown])
            axis.set_yticks(places, labels, fontsize=7)
            axis.invert_yaxis()
            if values and max(values) > WIDEST:
                axis.set_xlim(right=WIDEST)

        _panels(rows, path, panel, only, bars=True)

    return draw


def _order(row: Row, members: Sequence[Row], names: Sequence[str]) -> int:
    firsts = list(dict.fromkeys(str(member[names[0]]) for member in members))
    return firsts.index(str(row[names[0]]))


def _panels(
    rows: Sequence[Row],
    path: Path,
    panel: Callable[[Any, Sequence[Row], str], None],
    only: Callable[[Row], bool],
    bars: bool = False,
) -> None:
    """One row of panels a scenario, one panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if only(row)] or list(rows)
    scenes = list(dict.fromkeys(row.scene for row in rows))
    held_out = [text for text in texts_of(rows) if text != ASIDE]
    texts = held_out[:PANELS]
    most = max(sum(row.scene == scene for row in rows) for scene in scenes)
    height = max(2.4, 0.22 * most + 1) if bars else 3.4
    size = (4.2 * len(texts) + (1.0 if bars else 1.6), height * len(scenes))
    figure, axes = pyplot.subplots(len(scenes), len(texts), figsize=size, squeeze=False, layout="constrained")
    for line, scene in zip(axes, scenes, strict=True):
        members = [row for row in rows if row.scene == scene]
        for axis, text in zip(line, texts, strict=True):
            panel(axis, members, text)
            axis.set_title(f"{scene}: {text}", fontsize=9)
            axis.grid(alpha=0.3)
            if axis is not line[0] and bars:
                axis.set_yticklabels([])
        (line[0].set_xlabel if bars else line[0].set_ylabel)("increase of bits per byte over dense, %")
        handles, labels = line[0].get_legend_handles_labels()
        if handles:
            line[-1].legend(handles, labels, frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
