"""The study of importance's cost: what it makes of its cells, and the promise itself on the real model."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from cusprun.benchmarks.peers.cost import forward, importance, refit_statistics, summarize, timed
from cusprun.benchmarks.peers.cost_page import PROMISES, draw, page, write_csv
from cusprun.checkpoint import load_model
from cusprun.dense import find_dense


def cells() -> dict[str, Any]:
    """Two rounds, one layer, four channels and two kv groups of 1000 units."""
    found: dict[str, Any] = {}
    for number, (plain, scored, moments) in enumerate([(10.0, 12.0, 20.0), (12.0, 12.0, 27.0)]):
        for name, seconds in (("forward", plain), ("importance", scored), ("refit statistics", moments)):
            found[f"{name}, round {number}"] = {"cpu_s": seconds, "wall_s": 2 * seconds}
    units = [
        {"kind": kind, "index": index, "closed_form": closed, "block_change": closed, "layer_change": layer,
         "loss_change": loss}
        for kind, index, closed, layer, loss in [
            ("attention", 0, 0.5, 0.01, 0.3), ("attention", 1, 0.6, 0.02, 0.1),
            ("ffn", 3, 0.1, 0.1, 0.001), ("ffn", 8, 0.2, 0.2, -0.001), ("ffn", 9, 0.3, 0.3, 0.004),
            ("ffn", 11, 0.4, 0.4, 0.002),
        ]
    ]  # fmt: skip
    found["oracle, layer 4, 6 units, 2000 tokens"] = {"seconds": {"output": 3.0, "loss": 60.0}, "units": units}
    return found


@pytest.fixture
def study() -> dict[str, Any]:
    settings = {
        "model": "m", "scenario": "en-legal-qa", "tokens": 8000, "window": 500, "rounds": 2, "layers": [4],
        "oracle_tokens": 2000, "units": 6, "threads": 1,
    }  # fmt: skip
    found = {"settings": settings, "environment": {"cpu": "a processor"}, "cells": cells()}
    return {**found, "result": summarize(found, 1000)}


def test_what_the_cells_say(study: dict[str, Any]) -> None:
    result = study["result"]
    assert result["ratios"]["importance"]["rounds"] == [1.2, 1.0]
    assert result["ratios"]["importance"]["median"] == pytest.approx(1.1)
    assert result["ratios"]["refit statistics"]["median"] == pytest.approx((2 + 2.25) / 2)
    # 3 s for 6 units on a quarter of the tokens: 2000 s for 1000 units on all, and the importance of them took 12
    assert result["oracle_factor"]["output"] == pytest.approx(2000 / 12)
    assert result["oracle_factor"]["loss"] == pytest.approx(40000 / 12)
    ranks = result["spearman"]["4"]
    assert ranks["all units, block_change"] == pytest.approx(1)
    assert ranks["channels, layer_change"] == pytest.approx(1)
    assert ranks["all units, layer_change"] < 0
    assert ranks["channels, loss_change"] == pytest.approx(0.6)


def test_what_is_left_to_read(study: dict[str, Any], tmp_path: Path) -> None:
    write_csv(tmp_path / "s.csv", study)
    with (tmp_path / "s.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[2] == {
        "layer": "4", "kind": "ffn", "index": "3", "closed_form": "0.1", "block_change": "0.1", "layer_change": "0.1",
        "loss_change": "0.001",
    }  # fmt: skip
    draw(tmp_path / "s.png", study)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    text = page(study, "s")
    assert "| importance | 12.1 | 1.10 (1.00 … 1.20) | ≤ 1.3 |" in text
    assert "3,333 times" in text
    assert "| 4 | 1.000 |" in text
    assert "python -m cusprun.benchmarks.peers.cost" in text


@pytest.mark.slow
def test_importance_and_refit_statistics_cost_little_more_than_a_forward_pass() -> None:
    """CPU seconds of one thread, in turn: what else runs on the machine hardly counts. Three rounds if one is over."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dense = find_dense("smollm2-135m-instruct")
        model = load_model(dense.folder)
        windows = np.random.default_rng(0).integers(0, dense.anatomy.vocab_size, size=(8, 512))
        forward(model, windows[:1])
        ratios: dict[str, list[float]] = {name: [] for name in PROMISES}
        for _ in range(3):
            base = timed(lambda: forward(model, windows))["cpu_s"]
            ratios["importance"].append(timed(lambda: importance(dense, windows))["cpu_s"] / base)
            ratios["refit statistics"].append(timed(lambda: refit_statistics(dense, windows))["cpu_s"] / base)
            if all(ratios[name][0] <= limit for name, limit in PROMISES.items()):
                break
    finally:
        torch.set_num_threads(threads)
    for name, limit in PROMISES.items():
        assert median(ratios[name]) <= limit, ratios
