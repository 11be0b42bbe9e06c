"""Base-style against instruct-style calibration: the same questions and answers as plain text or through the chat
template, and the questions alone.

    python -m cusprun.benchmarks.peers.instruct
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import EN_LEGAL_QA, Scene, made_scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row, show
from cusprun.benchmarks.peers.study_picture import bars
from cusprun.benchmarks.tally import percent

METHODS = ("refit", "cus-prun")
RATIOS = (0.25, 0.5)
STYLES = {
    "plain": "question and answer as plain text",
    "conversations": "question and answer through the chat template",
    "questions": "the question alone through the chat template",
}


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    return [
        Cell(
            f"{scene.name}/{ratio:g}/{method}/{style}",
            scene,
            {"method": method, "ratio": ratio, "vocab": "keep", "general": 0},
            {"ratio": ratio, "method": method, "style": label},
            made_scene(style, scene),
        )
        for scene in scenes
        for style, label in STYLES.items()
        for method in METHODS
        for ratio in RATIOS
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    by = {(row.scene, row["ratio"], row["method"], row["style"]): row for row in rows}
    said = []
    for (scene, ratio, method, style), chat in by.items():
        if style != STYLES["conversations"]:
            continue
        for other in ("plain", "questions"):
            beside = by.get((scene, ratio, method, STYLES[other]))
            if beside is None:
                continue
            line = (
                f"{scene}, {method}, {show('ratio', ratio)}: {style} {percent(chat.increase('scenario'))} in the "
                f"scenario, {STYLES[other]} {percent(beside.increase('scenario'))}"
            )
            if chat.accuracy is not None and beside.accuracy is not None:
                line += f"; questions right {chat.accuracy:.1%} and {beside.accuracy:.1%}"
            said.append(f"{line}.")
    return said


STUDY = Study(
    name="instruct",
    title="Base-style and instruct-style calibration",
    about="Calibration on the scenario's own questions and answers alone, the same documents in every style, as far as "
    "they go towards the tokens asked for; measured on all of the scenario's held-out text, whose questions and "
    "answers the chat template renders, and on multiple choice.",
    cells=cells,
    groups=("ratio",),
    columns=("method", "style"),
    sentences=sentences,
    picture=bars(("style", "method", "ratio")),
    scenes=(EN_LEGAL_QA,),
    questions=64,
)

if __name__ == "__main__":
    main_of(STUDY)
