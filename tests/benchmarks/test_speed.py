"""Bench rows: every promised key, sane values, fresh processes in alternation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cusprun.benchmarks.run_once import measure, peak_rss_bytes
from cusprun.benchmarks.speed import BenchRow, Spread, bench, ratios, rounds
from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes.child import run_in_child

PROMISED = {"prefill_tps", "decode_tps", "ttft_ms", "load_s", "peak_rss_bytes", "file_bytes", "parameters",
            "macs_per_token"}  # fmt: skip
MIB = 2**20


def row(name: str, decode: list[float], file_bytes: int = 100) -> BenchRow:
    samples = {
        "prefill_tps": [10 * value for value in decode],
        "decode_tps": decode,
        "ttft_ms": [1000 / value for value in decode],
        "load_s": [0.1] * len(decode),
        "peak_rss_bytes": [2.0 * file_bytes] * len(decode),
    }
    return BenchRow(
        artifact=name,
        format="gguf",
        quant="q8_0",
        runtime="llama.cpp",
        device="cpu",
        threads=2,
        prefill_tokens=512,
        decode_tokens=128,
        prefill_tps=Spread.of(samples["prefill_tps"]),
        decode_tps=Spread.of(decode),
        ttft_ms=sum(samples["ttft_ms"]) / len(decode),
        load_s=0.1,
        peak_rss_bytes=2 * file_bytes,
        rss_before_load_bytes=10,
        file_bytes=file_bytes,
        parameters=file_bytes,
        macs_per_token=file_bytes,
        samples=samples,
    )


def test_bench_of_a_file_and_a_folder(gguf: Path, folder: Path) -> None:
    rows = bench([gguf, folder], prefill=64, decode=16, repetitions=2, threads=1)
    assert [found.format for found in rows] == ["gguf", "safetensors"]
    for found in rows:
        value = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert value.keys() >= PROMISED
        assert set(value["decode_tps"]) == {"mean", "sd", "n"}
        assert value["decode_tps"]["n"] == 2
        assert min(value["prefill_tps"]["mean"], value["decode_tps"]["mean"], value["load_s"]) > 0
        assert value["ttft_ms"] >= 1e3 * 64 / max(value["samples"]["prefill_tps"])
        assert 20 * MIB < value["rss_before_load_bytes"] < value["peak_rss_bytes"] < 4096 * MIB
        assert value["threads"] == 1
    assert rows[0].file_bytes == gguf.stat().st_size
    assert rows[0].parameters == rows[1].parameters


def test_peak_memory_is_the_child_s_own() -> None:
    """A parent that once held 400 MiB does not lend its peak to its children."""
    ballast = bytearray(400 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert peak_rss_bytes() > 400 * MIB
    assert run_in_child(peak_rss_bytes) < 200 * MIB
    del ballast


def test_short_context_shortens_the_prompt(folder: Path) -> None:
    found = measure(str(folder), prefill=1024, decode=8, threads=1)
    assert found["prefill_tokens"] == 512  # all that pico holds
    assert found["decode_tokens"] == 8


def test_alternation() -> None:
    assert rounds(2, 3) == [0, 1, 1, 0, 0, 1]
    assert rounds(1, 2) == [0, 0]


def test_ratios_are_paired_within_rounds() -> None:
    found = ratios(row("expert", [30.0, 60.0, 10.0], file_bytes=50), row("dense", [20.0, 40.0, 8.0]))
    assert found["decode_tps"] == {"of_means": pytest.approx(100 / 68), "median_of_pairs": 1.5, "pairs": 3}
    assert found["file_bytes"] == {"exact": 0.5}
    assert found["decode_yield"]["median_of_pairs"] == pytest.approx(0.75)


def test_spread_of_one_run_is_zero() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 0.0, 1)
    assert Spread.of([1.0, 3.0]).sd == pytest.approx(2**0.5)


def test_what_cannot_be_measured_is_said(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"(?s)decode 0.*repetitions -1"):
        bench([gguf], decode=0, repetitions=-1)
    with pytest.raises(InvalidRequest, match=r"name a \.gguf file or a model folder"):
        bench([])
    with pytest.raises(InvalidRequest, match="named twice"):
        bench([gguf, gguf])
    with pytest.raises(InvalidRequest, match="is not a file"):
        bench([tmp_path / "missing.gguf"])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(Failed, match="truncated"):
        bench([cut])
