"""Which dimensions of the scenario the calibration text should hold fixed, and how they should combine.

    python -m cusprun.benchmarks.peers.dimensions

Every cell is measured on the held-out texts of the whole scenario, whatever it was calibrated on.
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import EN_LEGAL_QA, Scene, made_scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row
from cusprun.benchmarks.peers.study_picture import bars
from cusprun.benchmarks.tally import percent

METHODS = ("refit", "cus-prun")
RATIO = 0.25
SUBSETS = ("L", "D", "T", "LD", "LDT")  # language, domain, task
COMBINES = ("intersection", "mixture", "max")
CONTROL = "none: general text"


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    found = []
    for scene in scenes:
        found += [_cell(scene, made_scene("general", scene), CONTROL, "control", method) for method in METHODS]
        held = {"L": scene.lang, "D": scene.domain, "T": scene.task}
        for letters in SUBSETS:
            if not all(held[letter] for letter in letters):
                continue  # the scenario lacks a dimension
            lang, domain, task = (value if letter in letters else None for letter, value in held.items())
            calibration = Scene(f"{letters}-of-{scene.name}", lang, domain, task, scene.corpus, scene.include)
            for method in METHODS:
                for combine in COMBINES if letters == "LDT" else (None,):
                    found.append(_cell(scene, calibration, letters, letters, method, combine))
    return found


def _cell(scene: Scene, calibration: Scene, label: str, short: str, method: str, combine: str | None = None) -> Cell:
    settings: dict[str, object] = {"method": method, "ratio": RATIO, "vocab": "keep", "general": 0}
    if combine is not None:
        settings["combine"] = combine
    labels = {"method": method, "dimensions": label, "combine": combine}
    name = f"{scene.name}/{method}/{short}" + (f"/{combine}" if combine else "")
    return Cell(name, scene, settings, labels, calibration)


def sentences(rows: Sequence[Row]) -> list[str]:
    said = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scene, row["method"]), []).append(row)
    for (scene, method), members in groups.items():
        for text in ("scenario", "domain", "general"):
            ranked = sorted(
                ((increase, row) for row in members if (increase := row.increase(text)) is not None),
                key=lambda pair: pair[0],
            )
            if len(ranked) > 1:
                (least, best), (most, worst) = ranked[0], ranked[-1]
                said.append(
                    f"{scene}, {method}, {text}: least with {_called(best)}, {percent(least)}; most with "
                    f"{_called(worst)}, {percent(most)} ({len(ranked)} cells)."
                )
    return said


def _called(row: Row) -> str:
    return str(row["dimensions"]) + (f" by {row['combine']}" if row["combine"] else "")


STUDY = Study(
    name="dimensions",
    title="Which dimensions, and how they combine",
    about="A quarter of all parameters removed, vocabulary kept, equal tokens and no added general text. L holds the "
    "language fixed, D the domain, T the task; with none of them general text of the language is the control. Where no "
    "way to combine is named it is the method's own: refit mixes, Cus-Prun intersects.",
    cells=cells,
    groups=("method",),
    columns=("dimensions", "combine"),
    sentences=sentences,
    picture=bars(("dimensions", "combine", "method")),
    scenes=(EN_LEGAL_QA,),
)

if __name__ == "__main__":
    main_of(STUDY)
