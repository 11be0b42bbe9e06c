"""The study that asks the bench whether it repeats itself: what it counts, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cusprun.benchmarks.peers import repeatability
from cusprun.benchmarks.spread import Ratio, Spread


def pair(first: float, second: float, same: float, slowed: float) -> dict[str, Any]:
    """A pair whose runs scatter by 1 % around these means and ratios."""
    scatter = [0.99, 1.01] * 3

    def mean(value: float) -> dict[str, Any]:
        return {"rounds": 6, "tests": {"tg8": vars(Spread.of([value * one for one in scatter]))}}

    def ratio(value: float) -> dict[str, Any]:
        return {"rounds": 6, "tests": {"tg8": Ratio.of([value * one for one in scatter], [1.0] * 6).as_json()}}

    return {"first": mean(first), "second": mean(second), "same": ratio(same), "slowed": ratio(slowed)}


def test_what_is_counted() -> None:
    """ci95 reaches 1.15 % to either side, the interval for another bench 1.6 %."""
    pairs = [
        pair(100, 100.5, 1.0, 0.952), pair(100, 101.4, 1.005, 0.96), pair(100, 104, 0.95, 1.0), {"first": {}}
    ]  # fmt: skip
    answers = repeatability.judge({"settings": {"slowdown": 0.05}, "pairs": pairs})
    assert [(answer["right"], answer["pairs"]) for answer in answers] == [(2, 3), (1, 3), (2, 3), (2, 3), (2, 3)]
    assert not any(answer["enough"] for answer in answers)
    assert answers[0]["largest_difference"] == pytest.approx(1 - 100 / 104)
    assert answers[3]["median_ratio"] == pytest.approx(0.96, rel=1e-3)
    assert answers[0]["half_width"] == pytest.approx(answers[1]["half_width"] * 2**0.5)


def test_a_study_goes_on_and_finds_a_large_slowdown(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "found"
    arguments = [str(gguf), "--pairs", "1", "--slowdown", "9", "--prefill", "256", "--decode", "64", "--threads", "1",
                 "--until", "0.9", "--max-seconds", "60", "--out", str(out)]  # fmt: skip
    repeatability.main(arguments)
    kept = json.loads(out.with_suffix(".json").read_text())
    slowed = kept["pairs"][0].pop("slowed")
    assert slowed["tests"]["pp256"]["of_pairs"] < 0.3
    assert "| pp256 | slower, by the ratio's interval below 1 |" in out.with_suffix(".md").read_text()
    out.with_suffix(".json").write_text(json.dumps(kept))
    repeatability.main(arguments)
    again = json.loads(out.with_suffix(".json").read_text())
    assert again["pairs"][0]["first"] == kept["pairs"][0]["first"]
    assert again["pairs"][0]["slowed"]["measured_at"] >= slowed["measured_at"]
    assert again["pairs"][0]["slowed"]["samples_s"] != slowed["samples_s"]


def test_one_round_tells_no_interval(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "found"
    with pytest.raises(SystemExit, match=r"one round took longer than --max-seconds 0\.001.*write more seconds"):
        repeatability.main([str(gguf), "--prefill", "8", "--decode", "8", "--max-seconds", "0.001", "--out", str(out)])
    assert not list(tmp_path.glob("found*"))


def test_options_that_make_no_sense(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, words in (("--pairs", "--pairs 0: write 1 or more"), ("--slowdown", "--slowdown 0: write more than 0")):
        with pytest.raises(SystemExit):
            repeatability.parse([str(gguf), flag, "0"])
        assert words in capsys.readouterr().err
