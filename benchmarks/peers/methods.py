"""refit beside every published method: the same text, the same budget, the same vocabulary setting.

    python -m cusprun.benchmarks.peers.methods
    python -m cusprun.benchmarks.peers.methods --scenario en-legal-qa --ratio 0.25 --method refit flap

With the vocabulary trimmed refit chooses how many tokens stay, and every rival gets the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import Scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row, show
from cusprun.benchmarks.peers.study_picture import curves
from cusprun.benchmarks.tally import percent

METHODS = ("refit", "cus-prun", "llm-pruner", "flap", "wanda-sp", "slicegpt", "shortgpt", "magnitude", "random")
RATIOS = (0.25, 0.5, 0.125, 0.33)  # in the order of what is promised
HALF_AT = (0.25, 0.5)
PROMISES = {("en-legal-qa", "scenario"): 0.06, ("en-legal-qa", "general"): 0.18}  # refit at 25 %
KEPT, TRIMMED = "kept", "trimmed"


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    """Kept vocabulary a method after the other, which share statistics; trimmed a ratio after the other, whose cells
    share the trimmed model.
    """
    found = []
    for scene in scenes:
        for method in METHODS:
            found += [_cell(scene, KEPT, ratio, method) for ratio in RATIOS]
        for ratio in RATIOS:
            found += [_cell(scene, TRIMMED, ratio, method) for method in METHODS]
    return found


def _cell(scene: Scene, vocabulary: str, ratio: float, method: str) -> Cell:
    settings = {"method": method, "ratio": ratio, "vocab": "keep" if vocabulary == KEPT else "auto"}
    name = f"{scene.name}/{vocabulary}/{ratio:g}"
    labels = {"vocabulary": f"vocabulary {vocabulary}", "ratio": ratio, "method": method}
    source = f"{name}/refit" if vocabulary == TRIMMED and method != "refit" else None
    return Cell(f"{name}/{method}", scene, settings, labels, vocab_of=source)


def sentences(rows: Sequence[Row]) -> list[str]:
    """refit beside its best rival in each group, and what was promised."""
    said = []
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scene, row["vocabulary"], row["ratio"]), []).append(row)
    for (scene, vocabulary, ratio), members in sorted(groups.items()):
        increases = {row["method"]: row.increase("scenario") for row in members}
        own = increases.pop("refit", None)
        rivals = {method: value for method, value in increases.items() if value is not None}
        where = f"{scene}, {vocabulary}, {show('ratio', ratio)}"
        if own is None or not rivals:
            continue
        best = min(rivals, key=lambda method: rivals[method])
        waiting = len(METHODS) - 1 - len(rivals)
        line = (
            f"{where}: refit adds {percent(own)} in the scenario, the best rival, {best}, {percent(rivals[best])}"
            + (f" ({waiting} rivals not run yet)" if waiting else "")
        )  # fmt: skip
        if rivals[best] > 0:
            line += f": {own / rivals[best]:.2f} of it"
            if ratio in HALF_AT:
                line += f"; at most half of it: {_met(own <= rivals[best] / 2)}"
        said.append(f"{line}.")
    for row in rows:
        if row["method"] == "refit" and row["ratio"] == 0.25:
            said += _promised(row)
    return said


def _promised(row: Row) -> list[str]:
    where = f"{row.scene}, {row['vocabulary']}, 25 %"
    said = [
        f"{where}: promised at most {100 * limit:g} % on the text *{text}*, is {percent(increase)}: "
        f"{_met(increase <= limit)}."
        for (scene, text), limit in PROMISES.items()
        if scene == row.scene and (increase := row.increase(text)) is not None
    ]
    if row.accuracy is not None and row.dense_interval is not None:
        low, high = row.dense_interval
        said.append(
            f"{where}: multiple choice {row.accuracy:.1%} right, dense {row.dense_accuracy:.1%} with 95 % interval "
            f"{low:.1%} … {high:.1%}; within it: {_met(low <= row.accuracy <= high)}."
        )
    return said


def _met(holds: bool) -> str:
    return "met" if holds else "not met"


STUDY = Study(
    name="methods",
    title="refit beside the published methods",
    about="Nine methods at four budgets in three scenarios; every method gets the same calibration text, the share of "
    "all parameters given is removed, nothing is trained afterwards. With the vocabulary trimmed every method gets "
    "the number of tokens that refit chose at that budget.",
    cells=cells,
    groups=("vocabulary", "ratio"),
    columns=("method",),
    sentences=sentences,
    picture=curves("removed", ("method",), log_y=True, only=lambda row: row["vocabulary"] == f"vocabulary {KEPT}"),
    questions=64,
)

if __name__ == "__main__":
    main_of(STUDY)
