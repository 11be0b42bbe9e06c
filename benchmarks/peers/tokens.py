"""How many calibration tokens a method needs, from 4k to 256k.

    python -m cusprun.benchmarks.peers.tokens

Below 16k the dimensions have too little for four windows of 512 each, so there windows are 128; at 16k both are run.
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import EN_LEGAL_QA, Scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row
from cusprun.benchmarks.peers.study_picture import curves
from cusprun.benchmarks.tally import percent

METHODS = ("refit", "cus-prun", "flap")
RATIO = 0.25
BUDGETS = (
    (4096, 128), (8192, 128), (16384, 128),
    (16384, 512), (32768, 512), (65536, 512), (131072, 512), (262144, 512),
)  # fmt: skip


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    return [
        Cell(
            f"{scene.name}/{budget}-{window}/{method}",
            scene,
            {"method": method, "ratio": RATIO, "vocab": "keep", "tokens": budget, "window": window},
            {"method": method, "tokens": budget, "window": window},
        )
        for scene in scenes
        for budget, window in BUDGETS
        for method in METHODS
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    said = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["window"] == BUDGETS[-1][1] and row.increase("scenario") is not None:
            groups.setdefault((row.scene, row["method"]), []).append(row)
    for (scene, method), members in groups.items():
        if len(members) < 2:
            continue
        members.sort(key=lambda row: row["tokens"])
        best = min(members, key=lambda row: row.increase("scenario") or 0.0)
        steps = "; ".join(f"{row['tokens']:,}: {percent(row.increase('scenario'))}" for row in members)
        said.append(f"{scene}, {method}, in the scenario by tokens: {steps}. Least at {best['tokens']:,}.")
    short = [
        f"{row.name} got {row.calibration_tokens:,} of {row['tokens']:,} tokens"
        for row in rows
        if row.calibration_tokens < 0.9 * row["tokens"]
    ]
    return said + ([f"The text was too short for: {'; '.join(short)}."] if short else [])


STUDY = Study(
    name="tokens",
    title="How many calibration tokens",
    about="A quarter of all parameters removed, vocabulary kept; the calibration text of one scenario at budgets from "
    "4k to 256k tokens, shared by its dimensions and the general text.",
    cells=cells,
    groups=("window",),
    columns=("method", "tokens"),
    sentences=sentences,
    picture=curves("tokens", ("method", "window"), log_x=True),
    scenes=(EN_LEGAL_QA,),
)

if __name__ == "__main__":
    main_of(STUDY)
