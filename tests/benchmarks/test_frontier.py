"""The frontier: who dominates whom, in figures and in words; one command over artifacts of all kinds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cusprun.benchmarks.contenders import compare_artifacts, find_candidates
from cusprun.benchmarks.frontier import Point, compare, dominating, frontier_table, remark, verdicts
from cusprun.benchmarks.kept_quality import evaluate_kept
from cusprun.benchmarks.quality import evaluate
from cusprun.benchmarks.speed import Spread
from cusprun.benchmarks.tally import percent
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx

ROUNDED = {"q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "iq3_m", "iq2_m", "auto"}


def point(name: str, size: int, loss: float, speed: float | None = None, kind: str = "dense") -> Point:
    spread = None if speed is None else Spread(speed, 0.1, 5)
    memory = None if speed is None else size
    return Point(name, kind, "gguf", "q8_0", size, 1, {"t": 1 + loss}, {"t": loss}, spread, spread, memory)  # type: ignore[arg-type]


def test_who_dominates_is_who_is_no_worse_in_both_and_better_in_one() -> None:
    chance = np.random.default_rng(0)
    points = [
        point(str(number), int(chance.integers(1, 8)), float(chance.integers(1, 8)) / 10, float(chance.integers(1, 8)))
        for number in range(40)
    ]
    for one in points:
        for axis in ("size", "speed", "memory"):
            place = one.at(axis)
            assert place is not None
            beaten = any(
                (there := other.at(axis)) is not None
                and there <= place
                and other.increase["t"] <= one.increase["t"]
                and (there, other.increase["t"]) != (place, one.increase["t"])
                for other in points
            )
            found = dominating(one, points, "t", axis)
            assert (found is not None) == beaten
            assert found is None or found.increase["t"] <= one.increase["t"]


def test_the_words_say_by_what_an_expert_is_dominated() -> None:
    points = [
        point("dense q8_0", 100_000_000, 0.0, 50),
        point("dense q4_0", 60_000_000, 0.05, 70),
        point("expert q8_0", 75_000_000, 0.10, 90, "expert"),
        point("expert q4_0", 45_000_000, 0.12, 95, "expert"),
        point("bad", 101_000_000, 0.2, 10, "expert"),
    ]
    assert [remark(one, points, "t") for one in points] == [
        "on the frontier",
        "on the frontier",
        "on the frontier; dominated in size by dense q4_0 and in memory by dense q4_0",
        "on the frontier",
        "dominated by dense q8_0",
    ]
    said = verdicts(points, "t")
    assert len(said) == 9
    assert said[0] == (
        "expert q8_0 is dominated in size: dense q4_0 has 60.0 MB instead of 75.0, and its bits per byte on t are "
        "+5.0 % over the reference's, not +10.0 %."
    )
    assert "expert q8_0: nothing here that is no slower loses as little on t." in said
    assert "expert q4_0: nothing here that takes no more memory loses as little on t." in said
    assert not [line for line in said if line.startswith("dense")]


def test_figures_that_are_printed_alike_are_not_set_against_each_other() -> None:
    points = [point("d", 91_700_000, 0.02), point("e", 91_730_000, 0.0201, kind="expert")]
    assert verdicts(points, "t") == [
        "e is dominated in size: d has 91.7 MB too, and "
        "its bits per byte on t are +2.0 % over the reference's, as here."
    ]


def timed(name: str, size: int, loss: float, rounds: list[float], memory: int, kind: str = "dense") -> Point:
    one = point(name, size, loss, 1.0, kind)
    return replace(one, decode_tps=Spread.of(rounds), peak_rss_bytes=memory, samples={"decode_tps": rounds})


def test_files_that_are_equal_dominate_one_another_by_no_more_than_chance() -> None:
    chance = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        both = [
            timed(name, 100, 0.1, chance.normal(100, 4, 5).tolist(), int(chance.integers(1_000_000, 1_003_000)))
            for name in "ab"
        ]
        dominated = [dominating(one, both, "t", "size", "speed", "memory") is not None for one in both]
        assert not all(dominated)
        found += any(dominated)
    assert found / 200 <= 0.08


def test_what_noise_hides_is_said() -> None:
    points = [
        timed("e", 100, 0.2, [100.0, 130.0, 95.0, 120.0, 101.0], 200_000_000, "expert"),
        timed("d", 100, 0.1, [108.0, 104.0, 106.0, 109.0, 105.0], 201_000_000),
    ]
    assert remark(points[0], points, "t") == "dominated by d"
    assert remark(points[1], points, "t") == "on the frontier"
    _, speed, memory = verdicts(points, "t")
    assert speed.startswith("e is dominated in speed: d has 106.4 tokens/s beside 109.2, no difference that is shown, ")
    assert memory.startswith("e is dominated in memory: d has 201 MB of memory beside 200, alike within 1%, and ")


def test_artifacts_of_all_kinds_are_compared_over_the_same_bytes(
    folder: Path,
    gguf: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    for quant in ("q8_0", "q4_0"):
        export_gguf(folder, tmp_path / f"{quant}.gguf", quant)
    export_onnx(folder, tmp_path / "onnx", "fp32")
    candidates, experts = find_candidates([gguf, tmp_path / "q8_0.gguf", tmp_path / "q4_0.gguf", tmp_path / "onnx"])
    assert not experts
    found = compare(candidates, {"t": [text]}, reference=gguf, context=64, repetitions=None)
    rows = {row["name"]: row for row in found["rows"]}
    own = evaluate(gguf, text, context=64, special=True)
    assert rows[gguf.stem]["increase"] == {"t": 0.0}
    assert rows[gguf.stem]["bits_per_byte"]["t"] == pytest.approx(own.bits_per_byte)
    assert rows["onnx"]["bits_per_byte"]["t"] == pytest.approx(own.bits_per_byte, rel=1e-4)
    beside = evaluate_kept(tmp_path / "q4_0.gguf", {"t": [text]}, against=gguf, special=True, context=64,
                           max_tokens=None)["t"]  # fmt: skip
    assert beside.increase_stderr is not None
    assert rows["q4_0"]["increase_stderr"] == {"t": beside.increase_stderr}
    assert rows[gguf.stem]["increase_stderr"] == {"t": None}
    assert rows["q4_0"]["file_bytes"] == (tmp_path / "q4_0.gguf").stat().st_size
    assert rows["q4_0"]["decode_tps"] is None
    assert {line.split()[0].rstrip(":") for line in found["verdicts"]} == set(rows)  # each was given: words on each
    assert capfd.readouterr().err.count(" of t: ") == 4  # the reference alone, then each of the others beside it
    assert compare(candidates, {"t": [text]}, reference=gguf, context=64, repetitions=None) == found
    assert " of t: " not in capfd.readouterr().err
    assert frontier_table(found).rows[0][0] == "q4_0"
    assert frontier_table(found).rows[0][3] == percent(beside.increase, beside.increase_stderr)


def test_speed_and_memory_join(folder: Path, gguf: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text * 8)
    export_gguf(folder, tmp_path / "q8_0.gguf", "q8_0")
    found = compare_artifacts(
        [gguf, tmp_path / "q8_0.gguf"], text=tmp_path / "t.txt", eval_tokens=1024, repetitions=2, threads=1
    )
    assert found["text"] == "t"
    assert all(row["decode_tps"]["n"] == 2 and row["peak_rss_bytes"] > 0 for row in found["rows"])
    for row in found["rows"]:
        assert np.mean(row["samples"]["decode_tps"]) == pytest.approx(row["decode_tps"]["mean"])
    assert "speeds differ where the 95 % interval of the ratio of their rounds excludes 1" in found["how"]


def test_a_type_that_needs_text_is_left_out_where_there_is_none(
    folder: Path, gguf: Path, text: str, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(text * 8)

    def taken(quant: str) -> dict[str, Any]:
        return compare_artifacts(
            [gguf], text=tmp_path / "t.txt", dense=str(folder), quants=[quant], eval_tokens=1024, repetitions=None
        )

    assert {row["name"].split()[-1] for row in taken("all")["rows"] if row["kind"] == "dense"} == ROUNDED - {"iq2_m"}
    with pytest.raises(InvalidRequest, match="--quant iq2_m needs an importance matrix"):
        taken("q8_0,iq2_m")


def test_what_cannot_be_compared_is_told_together(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no expert is among them, whose held-out text"):
        compare_artifacts([gguf, gguf])
    with pytest.raises(InvalidRequest) as error:
        compare_artifacts([gguf], smaller=["other"])
    assert len(str(error.value).splitlines()) == 2
    (tmp_path / "t.txt").write_text("words " * 5000)
    with pytest.raises(InvalidRequest, match="makes no frontier"):
        compare_artifacts([gguf], text=tmp_path / "t.txt")
    with pytest.raises(InvalidRequest, match="two artifacts are called"):
        compare_artifacts([gguf, gguf], text=tmp_path / "t.txt")
    with pytest.raises(InvalidRequest, match="quantization 'q99' is unknown"):
        compare_artifacts([gguf], text=tmp_path / "t.txt", quants=["q99"])
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "expert.json").write_text(json.dumps({"name": "e"}))
    with pytest.raises(InvalidRequest) as error:
        find_candidates([tmp_path / "none", tmp_path / "expert"])
    assert "is no model folder" in str(error.value)
    assert "is no expert that a build left" in str(error.value)


def test_artifacts_outside_the_expert_are_not_opened(gguf: Path, tmp_path: Path) -> None:
    card = {"name": "e", "base": {"id": "m"}, "artifacts": [{"path": str(gguf), "quant": "f32"}]}
    (tmp_path / "expert.json").write_text(json.dumps(card))
    with pytest.raises(InvalidRequest, match="which is not there"):
        find_candidates([tmp_path])
