"""Where refit cuts: the integer program on measured losses, beside Cus-Prun's scores and the same share everywhere.

python -m cusprun.benchmarks.peers.widths
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import Scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row, show
from cusprun.benchmarks.peers.study_picture import bars
from cusprun.benchmarks.tally import percent

RATIOS = (0.25, 0.5)
LESS = 0.15  # promised: the program's increase is at least this share smaller than that of equal widths
WIDTHS: dict[str, dict[str, Any]] = {
    "measured": {"widths": "measured"},
    "even": {"widths": "even"},
    "scores": {"widths": "scores"},
    "measured, one width": {"widths": "measured", "layout": "uniform"},
}


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    return [
        Cell(
            f"{scene.name}/{ratio:g}/{name.replace(', ', '-').replace(' ', '-')}",
            scene,
            {"method": "refit", "ratio": ratio, "vocab": "keep", **settings},
            {"ratio": ratio, "widths": name},
        )
        for scene in scenes
        for ratio in RATIOS
        for name, settings in WIDTHS.items()
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    said = []
    by = {(row.scene, row["ratio"], row["widths"]): row for row in rows}
    for (scene, ratio, widths), even in by.items():
        measured = by.get((scene, ratio, "measured"))
        if widths != "even" or measured is None:
            continue
        for text in even.bits:
            own, other = measured.increase(text), even.increase(text)
            if own is None or other is None or other <= 0:
                continue
            less = 1 - own / other
            line = (
                f"{scene}, {show('ratio', ratio)}, {text}: measured widths {percent(own)} with "
                f"{measured.parameters / 1e6:.2f} M parameters, even ones {percent(other)} with "
                f"{even.parameters / 1e6:.2f} M: {100 * abs(less):.0f} % {'less' if less >= 0 else 'more'}"
            )
            if text == "scenario":
                line += f"; at least {100 * LESS:g} % less: {'met' if less >= LESS else 'not met'}"
            said.append(f"{line}.")
    return said


STUDY = Study(
    name="widths",
    title="Where refit cuts",
    about="refit at the same number of parameters, vocabulary kept: widths of every layer from the integer program on "
    "measured losses, the same share in every layer, widths from Cus-Prun's scores, and the program held to one width "
    "for all layers.",
    cells=cells,
    groups=("ratio",),
    columns=("widths",),
    sentences=sentences,
    picture=bars(("widths", "ratio")),
)

if __name__ == "__main__":
    main_of(STUDY)
