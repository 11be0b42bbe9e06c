"""The study of smaller vocabularies on a tiny model: cells that go on, and what the page says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun.benchmarks.peers.vocabulary import cut_windows, score
from cusprun.benchmarks.peers.vocabulary_page import METHODS, write_pages
from cusprun.checkpoint import load_model, load_tokenizer
from cusprun.recipe import DEFAULT_MODEL
from cusprun.vocabulary import order_removals, read_pieces, trim_model
from tests.vocabulary.tokenizers_made import DECLARATION, make


@pytest.mark.slow
def test_every_way_to_choose_reads_the_same_bytes_and_the_study_goes_on(tmp_path: Path) -> None:
    dense, out = make(tmp_path / "model"), tmp_path / "found"
    command = [sys.executable, "-m", "cusprun.benchmarks.peers.vocabulary", "--model", str(dense), "--out", str(out),
               "--tokens", "1024", "--removed", "32"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert {(row["method"], row["removed"]) for row in first["cells"]} == {(method, 32) for method in METHODS}
    assert set(first["dense"]["bytes"]) == {"scenario", "domain", "general"}
    cells = [{**row, "prices": 0, "share": -1.0} if "prices" in row else row for row in first["cells"]]
    assert cells != first["cells"]  # one whose tokens went by other prices
    out.with_suffix(".json").write_text(json.dumps({**first, "cells": cells}))
    done = subprocess.run([*command, "64"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sum(first["weights"].values()) == pytest.approx(1, abs=1e-3)
    assert first["weights"]["general"] == pytest.approx(1 / 3, abs=1e-3)
    both = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert both["cells"][:3] == first["cells"]
    assert len(both["cells"]) == 6
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {removed} |" in page for removed in (0, 32, 64))
    assert "Promised" not in page  # of the default model's seven per cent
    assert len(out.with_suffix(".csv").read_text(encoding="utf-8").splitlines()) == 1 + 6 * 3
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_windows_follow_each_other_and_score_the_bytes_behind_what_is_read(tmp_path: Path) -> None:
    """A trimmed vocabulary reads the same bytes, in more tokens; nats are those of transformers' own loss."""
    folder = make(tmp_path / "model")
    pieces, tokenizer = read_pieces(folder), load_tokenizer(folder)
    text = " ".join(DECLARATION.values())
    windows = cut_windows([text] * 40, tokenizer, 3)
    joined = "\n\n".join([text] * 40)
    assert len(windows) == 3
    for window in windows:
        assert window.before + window.scored in joined
        assert window.scored[0].isspace()
    kept = np.setdiff1d(np.arange(pieces.rows), order_removals(pieces, np.arange(pieces.rows, 0, -1.0))[:128]).tolist()
    trim_model(folder, kept, tmp_path / "trimmed")
    lengths = []
    for model in (folder, tmp_path / "trimmed"):
        nats = score(model, {"text": windows})["text"]
        read = load_tokenizer(model)
        before, scored = (
            read(part, add_special_tokens=False)["input_ids"] for part in (windows[0].before, windows[0].scored)
        )
        assert read.decode(scored) == windows[0].scored
        labels = torch.tensor([[-100] * len(before) + scored])
        with torch.no_grad():
            loss = load_model(model)(torch.tensor([before + scored]), labels=labels).loss
        assert nats[0] == pytest.approx(float(loss) * len(scored), rel=1e-4)
        lengths.append(len(scored))
    assert lengths[1] > lengths[0]


FOUND = {
    "settings": {"model": DEFAULT_MODEL, "scenario": "en-legal-qa", "tokens": 512},
    "weights": {"domain": 0.67, "general": 0.33},
    "command": "python -m cusprun.benchmarks.peers.vocabulary --tokens 512",
    "dense": {"nats": {"scenario": [1.0]}, "bytes": {"scenario": 1}},
    "prices": {"sample_tokens": 1, "places": 1, "mean_nats": 1.0, "again": 0.2, "explained": 0.5},
}


def page_of(folder: Path, increase: float, **settings: str) -> str:
    texts = {"scenario": {"bits_per_byte": 1.0, "increase": increase, "stderr": 0.001}}
    cells = [
        {"method": "expected loss", "removed": removed, "share": share, "texts": texts, "expected": 0.001,
         "expected_new_text": 0.002}
        for removed, share in ((8192, 0.035), (16384, 0.0702), (17000, 0.0728))
    ]  # fmt: skip
    write_pages(folder / "found", {**FOUND, "settings": FOUND["settings"] | settings, "cells": cells})
    return (folder / "found.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("increase", "verdict"), [(0.004, "met"), (0.006, "not met")])
def test_the_page_holds_the_promise_against_the_figure(tmp_path: Path, increase: float, verdict: str) -> None:
    page = page_of(tmp_path, increase)
    (line,) = [line for line in page.splitlines() if "Promised" in line]
    assert line.endswith(f"{100 * increase:+.2f}%: {verdict}.")
    assert "`python -m cusprun.benchmarks.peers.vocabulary --tokens 512`" in page
    assert "(domain 0.67, general 0.33)" in page
    assert "16384 rows +0.10% and +0.20%" in page


def test_nothing_was_promised_of_other_models_and_scenarios(tmp_path: Path) -> None:
    assert "Promised" not in page_of(tmp_path, 0.1, model="other")
    assert "Promised" not in page_of(tmp_path, 0.1, scenario="de-software-qa")
