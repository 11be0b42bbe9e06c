"""The study of smaller vocabularies on a tiny model: cells that go on, and what the page says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cusprun.benchmarks.peers.vocabulary_page import METHODS, write_pages
from tests.vocabulary.tokenizers_made import make


def test_every_way_to_choose_reads_the_same_bytes_and_the_study_goes_on(tmp_path: Path) -> None:
    dense, out = make(tmp_path / "model"), tmp_path / "found"
    command = [sys.executable, "-m", "cusprun.benchmarks.peers.vocabulary", "--model", str(dense), "--out", str(out),
               "--tokens", "1024", "--removed", "32"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert {(row["method"], row["removed"]) for row in first["cells"]} == {(method, 32) for method in METHODS}
    assert set(first["dense"]["bytes"]) == {"scenario", "domain", "general"}
    for row in first["cells"]:
        for name, figures in row["texts"].items():
            bits = sum(first["dense"]["nats"][name]) / 0.6931471805599453 / first["dense"]["bytes"][name]
            assert figures["bits_per_byte"] == pytest.approx(bits * (1 + figures["increase"]))
    done = subprocess.run([*command, "64"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    both = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert both["cells"][:3] == first["cells"]
    assert len(both["cells"]) == 6
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {removed} |" in page for removed in (0, 32, 64))
    assert "Promised" not in page  # of the default model's seven per cent
    assert len(out.with_suffix(".csv").read_text(encoding="utf-8").splitlines()) == 1 + 6 * 3
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("increase", "verdict"), [(0.004, "met"), (0.006, "not met")])
def test_the_page_holds_the_promise_against_the_figure(tmp_path: Path, increase: float, verdict: str) -> None:
    texts = {"scenario": {"bits_per_byte": 1.0, "increase": increase, "stderr": 0.001}}
    found = {
        "settings": {"model": "m", "scenario": "s", "tokens": 512, "weights": {}},
        "dense": {"nats": {"scenario": [1.0]}, "bytes": {"scenario": 1}},
        "prices": {"sample_tokens": 1, "places": 1, "mean_nats": 1.0, "again": 0.2, "explained": 0.5},
        "cells": [
            {"method": "expected loss", "removed": removed, "share": share, "texts": texts, "expected": 0.001}
            for removed, share in ((8192, 0.035), (16384, 0.0702))
        ],
    }
    write_pages(tmp_path / "found", found)
    page = (tmp_path / "found.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "Promised" in line]
    assert line.endswith(f"{100 * increase:+.2f}%: {verdict}.")
