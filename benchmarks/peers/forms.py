"""refit with gate and up moving too, with what reads the removed neurons alone, and each layer for itself, judged on
calibration-side text.

    python -m cusprun.benchmarks.peers.forms

The documents set aside give no statistics and are no held-out text: the choice of the form may look at them.
"""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.benchmarks.peers.grid import Cell
from cusprun.benchmarks.peers.scenes import Scene
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import ASIDE, Row, show
from cusprun.benchmarks.peers.study_picture import bars
from cusprun.benchmarks.tally import percent

FORMS = ("joint", "sequential", "parallel")
RATIOS = (0.25, 0.5)
FEWER = 4  # the second budget of calibration tokens is the first over this


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    return [
        Cell(
            f"{scene.name}/{ratio:g}/{budget}/{form}",
            scene,
            {"method": "refit", "ratio": ratio, "vocab": "keep", "form": form, "tokens": budget},
            {"ratio": ratio, "tokens": budget, "form": form},
        )
        for scene in scenes
        for budget in (tokens, tokens // FEWER)
        for ratio in RATIOS
        for form in FORMS
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    by = {(row.scene, row["ratio"], row["tokens"], row["form"]): row for row in rows}
    said = []
    for (scene, ratio, tokens, form), row in by.items():
        for simpler in FORMS[FORMS.index(form) + 1 :]:
            beside = by.get((scene, ratio, tokens, simpler))
            own, other = row.increase(ASIDE), beside.increase(ASIDE) if beside is not None else None
            if own is None or other is None:
                continue
            verdict = "met" if own <= other else "not met"
            said.append(
                f"{scene}, {show('ratio', ratio)}, {tokens:,} tokens: on the text set aside {form} {percent(own)}, "
                f"{simpler} {percent(other)}; never worse than {simpler}: {verdict}."
            )
    return said


STUDY = Study(
    name="forms",
    title="refit, joint, sequential and parallel",
    about="refit with measured widths, vocabulary kept: each layer refitted on what the compacted layers before it "
    "give, gate_proj and up_proj of narrow FFNs too (joint) or not (sequential), or on what the dense model gives "
    "(parallel).",
    cells=cells,
    groups=("ratio",),
    columns=("tokens", "form"),
    sentences=sentences,
    picture=bars(("form", "tokens", "ratio")),
)

if __name__ == "__main__":
    main_of(STUDY)
