"""`build --recover`: the compacted model is trained, and what is trained is what ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import Weights
from cusprun.dense import Sizes
from cusprun.needs import minutes
from cusprun.recipe import Recipe
from tests.test_build import QUICK, run

pytest.importorskip("peft")
COURSE = ("--recover-tokens", "4096", "--recover-steps", "16", "--recover-rank", "4", "--recover-rate", "0.003")


@pytest.mark.parametrize(("kind", "vocab"), [("lora", "keep"), ("distill", "448")])
def test_what_ships_is_the_recovered_model(
    tmp_path: Path, pico_model: Path, own_text: Path, kind: str, vocab: str
) -> None:
    out = tmp_path / "e"
    words = ("build", "--model", pico_model, "--corpus", own_text, "--out", out, "--ratio", 0.3, "--vocab", vocab)
    done = run(*words, "--recover", kind, *COURSE, *QUICK, "--json")
    said = done.stderr
    assert said.index(f"recovery by {kind}: about ") < said.index("recovery: 16 steps") < said.index("gguf.f32: ")
    recovery = json.loads(done.stdout)["method"]["recover"]
    assert (recovery["kind"], recovery["steps"], recovery["rank"]) == (kind, 16, 4)
    assert recovery["learning_rate"] == 0.003
    assert recovery["kept"]
    assert (recovery["divergence_after"] is not None) == (kind == "distill")
    figure = "divergence" if kind == "distill" else "loss"
    assert recovery[f"{figure}_after"] < recovery[f"{figure}_before"]
    cut, model = out / ".stages" / "compacted", out / "model"
    assert describe(cut).layers == describe(model).layers
    assert describe(model).vocab_size == (448 if vocab == "448" else describe(pico_model).vocab_size)
    before, after = Weights(cut), Weights(model)
    assert set(before) == set(after)
    changed = {name.rsplit(".", 2)[1] for name in before if not torch.equal(before[name], after[name])}
    assert {"down_proj", "gate_proj", "o_proj", "q_proj"} <= changed
    assert "recovery" in json.loads((model / "config.json").read_text())["cusprun"]
    again = run(*words, "--recover", kind, *COURSE, *QUICK)
    assert "model: done before, kept" in again.stderr


def test_the_plan_counts_recovery_in(pico_model: Path) -> None:
    sizes = Sizes(describe(pico_model), 4, False)
    tokens = 40 * 65536
    took = [
        minutes(Recipe(corpus=("own.txt",), vocab="keep", recover=kind, recover_tokens=tokens), sizes, False)[1]
        for kind in (None, "lora", "distill")
    ]
    assert took[0] < took[1] < took[2]
