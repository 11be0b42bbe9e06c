"""The study of a server under load: its slope, its verdicts, and that it sees a wrong answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from cusprun.benchmarks.peers.serving import main, problems_of, questions
from cusprun.benchmarks.peers.serving_load import percentiles, put_load, slope_of
from cusprun.runtimes import open_runtime
from tests.deploy.serving import answer_alone, serving, small_gguf


def samples(growth_per_minute: float, noise: float = 30_000, seed: int = 0) -> list[tuple[float, int]]:
    """Five minutes of memory, once a second, with noise that outlasts a sample."""
    random = np.random.default_rng(seed)
    wander = np.convolve(random.normal(0, noise, 330), np.ones(5) / 5)[10:310]
    return [(float(at), round(90e6 + growth_per_minute * at / 60 + wander[at])) for at in range(300)]


def test_slope_tells_growth_from_noise() -> None:
    found = slope_of(samples(500_000))
    assert found.bytes_per_minute == pytest.approx(500_000, rel=0.1)
    assert found.ci95[0] < 500_000 < found.ci95[1]
    assert found.ci95[0] > 0
    held = [low < 0 < high for low, high in (slope_of(samples(0, seed=seed)).ci95 for seed in range(40))]
    assert sum(held) >= 34
    start = [(at, 10**6 * round(at) if at < 50 else 50 * 10**6) for at, _ in samples(0)]
    assert slope_of(start).bytes_per_minute == pytest.approx(0)  # what is filled once is no growth
    with pytest.raises(ValueError, match="too few"):
        slope_of(samples(0)[:20])


def test_percentiles() -> None:
    assert percentiles([1.0]) == {"p50": None, "p95": None, "p99": None, "max": None, "n": 1}
    assert percentiles([float(value) for value in range(101)]) == {
        "p50": 50,
        "p95": 95,
        "p99": 99,
        "max": 100,
        "n": 101,
    }


def test_questions_differ_and_half_share_a_beginning() -> None:
    found = questions(32)
    assert len(set(found)) == 32
    assert sum(question.startswith("Section 1.") for question in found) == 16


def test_what_was_promised_and_not_kept() -> None:
    good = {"wrong": 0, "alone_again_the_same": True, "metrics_after": {"running": 0, "waiting": 0}, "exit_code": 0}
    assert problems_of(good) == []
    bad = {"wrong": 2, "alone_again_the_same": False, "metrics_after": {"running": 1, "waiting": 0}, "exit_code": 1}
    assert len(problems_of(bad)) == 4


def test_a_wrong_answer_is_seen(tmp_path: Path) -> None:
    gguf = small_gguf(tmp_path)
    runtime = open_runtime(gguf, context=512, threads=1)
    expected = {question: answer_alone(runtime, question, 6) for question in ("Who pays?", "Wer zahlt?", "Qui paie?")}
    runtime.close()
    expected["Wer zahlt?"] += "x"
    with serving(gguf) as server:
        seen = asyncio.run(put_load(server.url, "pico", expected, clients=8, seconds=2, max_tokens=6))
    assert {one["question"] for one in seen.wrong} == {"Wer zahlt?"}
    assert seen.counts["right"] > 0
    assert len(seen.whole_s) == seen.counts["right"] + seen.counts["wrong"]


def test_studies_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.gguf"), "--out", str(tmp_path / "out")]) == 2
    (tmp_path / "there.gguf").touch()
    assert main([str(tmp_path / "there.gguf"), "--seconds", "3"]) == 2
    assert "too short" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_the_published_page_kept_its_promises() -> None:
    found = json.loads((Path(__file__).parents[2] / "docs" / "results" / "serving.json").read_text(encoding="utf-8"))
    assert problems_of(found) == []
    assert found["settings"]["clients"] == 64
    assert found["seconds"] >= 300
    assert found["refused_429"] > 0
