"""Calibration on the scenario against calibration on general text, at equal tokens.

python -m cusprun.benchmarks.peers.specialised
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import Scene, made_scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row, show
from cusprun.benchmarks.peers.study_picture import bars
from cusprun.benchmarks.tally import percent

RATIOS = (0.25, 0.33, 0.5)
METHODS = ("refit", "cus-prun", "flap")
SPECIALISED, MIXED, GENERAL = "specialised", "specialised, 1/8 general", "general"


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    """All of one calibration before the next: they share its text and statistics."""
    found = []
    for scene in scenes:
        for calibration, share in ((SPECIALISED, 0), (MIXED, 0.125), (GENERAL, 0)):
            for method in METHODS:
                for ratio in RATIOS:
                    short = calibration.replace(", 1/8 general", "-mixed")
                    settings = {"method": method, "ratio": ratio, "vocab": "keep", "general": share}
                    labels = {"method": method, "ratio": ratio, "calibration": calibration}
                    on = made_scene("general", scene) if calibration == GENERAL else None
                    found.append(Cell(f"{scene.name}/{ratio:g}/{method}/{short}", scene, settings, labels, on))
    return found


def sentences(rows: Sequence[Row]) -> list[str]:
    by = {(row.scene, row["ratio"], row["method"], row["calibration"]): row for row in rows}
    said = []
    for (scene, ratio, method, calibration), general in by.items():
        if calibration != GENERAL:
            continue
        for name in (SPECIALISED, MIXED):
            special = by.get((scene, ratio, method, name))
            if special is None:
                continue
            parts = []
            for text in ("scenario", "domain", "general"):
                own, other = special.increase(text), general.increase(text)
                if own is not None and other is not None:
                    better = f"{name} wins" if own < other else "general wins" if other < own else "equal"
                    parts.append(f"{text} {percent(own)} against {percent(other)} ({better})")
            said.append(f"{scene}, {method}, {show('ratio', ratio)}, {name} against general: {'; '.join(parts)}.")
    return said


STUDY = Study(
    name="specialised",
    title="Specialised against general calibration",
    about="The same number of calibration tokens from the scenario's dimensions, from these with an eighth of general "
    "text, or from general text of the scenario's language alone; vocabulary kept.",
    cells=cells,
    groups=("ratio",),
    columns=("method", "calibration"),
    sentences=sentences,
    picture=bars(("calibration", "method", "ratio")),
)

if __name__ == "__main__":
    main_of(STUDY)
