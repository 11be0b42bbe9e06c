"""What ε removes and what that costs: neurons whose removal changes a layer's output by no more than it.

python -m cusprun.benchmarks.peers.epsilon
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import EN_LEGAL_QA, Scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row
from cusprun.benchmarks.peers.study_picture import curves
from cusprun.benchmarks.tally import percent

METHODS = ("cus-prun", "refit")
EPSILONS = (0.003, 0.004, 0.005, 0.006, 0.0075, 0.01)  # next to nothing to half of SmolLM2-135M


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    return [
        Cell(
            f"{scene.name}/{epsilon:g}/{method}",
            scene,
            {"method": method, "epsilon": epsilon, "vocab": "keep"},
            {"epsilon": epsilon, "method": method},
        )
        for scene in scenes
        for method in METHODS
        for epsilon in EPSILONS
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    said = []
    for row in rows:
        other = next(
            (other for other in rows if other.scene == row.scene and other["epsilon"] == row["epsilon"]
             and other["method"] == "refit"), None,
        )  # fmt: skip
        if row["method"] == "cus-prun" and other is not None:
            said.append(
                f"{row.scene}, ε = {row['epsilon']:g} removes {row.removed:.1%} of all parameters: Cus-Prun "
                f"{percent(row.increase('scenario'))} in the scenario, refit at the same widths "
                f"{percent(other.increase('scenario'))}."
            )
    return said


STUDY = Study(
    name="epsilon",
    title="ε: what it removes and what that costs",
    about="Instead of a budget ε is given: a neuron goes where its removal changes the layer's output by no more than "
    "that share on every dimension's text. refit takes the same widths and moves what is left; vocabulary kept.",
    cells=cells,
    groups=(),
    columns=("method", "epsilon"),
    sentences=sentences,
    picture=curves("removed", ("method",)),
    scenes=(EN_LEGAL_QA,),
)

if __name__ == "__main__":
    main_of(STUDY)
