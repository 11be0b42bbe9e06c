"""Bench rows: every promised key, sane values, fresh processes in alternation."""

from __future__ import annotations

import json
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cusprun.benchmarks.run_once import measure, peak_rss_bytes
from cusprun.benchmarks.speed import BenchRow, Spread, bench, order, ratios
from cusprun.benchmarks.tables import as_text, bench_table
from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import open_runtime
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
        assert {"mean", "sd", "n"} < set(value["decode_tps"])
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


def test_alternation(gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process a run, the artifacts in turn, every other round backwards."""
    assert [order(2, number) for number in range(3)] == [[0, 1], [1, 0], [0, 1]]
    assert order(1, 1) == [0]
    ran = []

    def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ran.append((Path(args[0]), kwargs["prefill"], kwargs["decode"]))
        return run_in_child(function, *args, **kwargs)

    monkeypatch.setattr("cusprun.benchmarks.speed.run_in_child", watched)
    other = gguf.with_name("other.gguf")
    other.unlink(missing_ok=True)
    other.symlink_to(gguf)
    bench([gguf, other], prefill=[8, 16], decode=4, repetitions=2, threads=1)
    sizes = ((8, 4), (16, 0))  # the main run, and the other prompt for itself
    assert ran == [(path, *size) for size in sizes for path in (gguf, other)] + [
        (path, *size) for size in sizes for path in (other, gguf)
    ]


def test_ratios_are_paired_within_rounds() -> None:
    found = ratios(row("expert", [30.0, 60.0, 10.0], file_bytes=50), row("dense", [20.0, 40.0, 8.0]))
    decode = found["decode_tps"]
    assert (decode["of_means"], decode["median_of_pairs"], decode["pairs"]) == (pytest.approx(100 / 68), 1.5, 3)
    assert decode["of_pairs"] == pytest.approx((1.5 * 1.5 * 1.25) ** (1 / 3))
    assert decode["ci95"][0] < decode["of_pairs"] < decode["ci95"][1]
    assert found["file_bytes"] == {"exact": 0.5}
    assert found["decode_yield"]["median_of_pairs"] == pytest.approx(0.75)


def test_records_of_old_are_read() -> None:
    """What a finished expert's .stages holds of a bench before there were intervals."""
    value = row("expert.gguf", [30.0, 60.0]).as_json()
    fields = BenchRow.__dataclass_fields__
    kept = {name: value[name] for name in list(fields)[: list(fields).index("tests")]}
    for name in ("prefill_tps", "decode_tps"):
        kept[name] = {key: kept[name][key] for key in ("mean", "sd", "n")}
    old = TypeAdapter(BenchRow).validate_python(kept)
    assert old.decode_tps == Spread(45.0, pytest.approx(21.2132, rel=1e-4), 2)
    assert ratios(old, old)["decode_tps"]["of_pairs"] == 1
    assert "45.0 ± 21.2" in as_text(bench_table([old.as_json()]))


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


@pytest.mark.parametrize("artifact", ["gguf", "folder", "onnx"])
def test_depth_is_in_the_cache(artifact: str, request: pytest.FixtureRequest) -> None:
    """As many tokens as the runtime itself counts, and room for no more."""
    found = run_in_child(measure, str(request.getfixturevalue(artifact)), prefill=0, decode=16, depth=200, threads=1)
    assert (found["depth"], found["decode_tokens"], found["cached_tokens"]) == (200, 16, 216)
    assert found["context"] == 216
    assert found["decode_s"] > 0
    assert "prefill_s" not in found


def test_a_generation_reads_a_deep_cache(gguf: Path) -> None:
    """The logits of the same token differ after what is in the cache: it is attended to."""
    runtime = open_runtime(gguf, context=64, threads=1)
    runtime.prefill([5])
    alone = runtime.step(7)
    runtime.prefill([*range(10, 40), 5])
    assert runtime.cached == 31
    assert abs(runtime.step(7) - alone).max() > 1e-3
    runtime.close()


@pytest.mark.alone
def test_a_slowdown_is_as_large_as_was_asked(gguf: Path, tmp_path: Path) -> None:
    """Calls that take five times as long, in turn with the same calls as they are."""
    beside = tmp_path / "beside.gguf"
    beside.symlink_to(gguf)
    rows = bench([gguf, beside], prefill=256, decode=128, repetitions=5, threads=1, slowdowns=[0.0, 4.0])
    for test, other in zip(rows[0].tests, rows[1].tests, strict=True):
        assert 3.5 < min(other.samples_s) / min(test.samples_s) < 7


def test_files_are_read_anew_before_they_are_held_against_each_other(gguf: Path, tmp_path: Path) -> None:
    """How one came into the page cache decides how large its pages are there, and that how fast it decodes."""
    from cusprun.benchmarks import page_cache

    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf.read_bytes())
    dropped = page_cache.renew([copy])
    assert page_cache.resident_share([copy]) == 1
    assert copy.read_bytes() == gguf.read_bytes()
    if dropped is None:
        assert page_cache.drop([copy]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_read_anew_lies_in_small_pages(tmp_path: Path) -> None:
    """Mapped whole, no part of it is mapped by 2 MiB at once."""
    from cusprun.benchmarks import page_cache

    large = tmp_path / "large"
    large.write_bytes(bytes(2**26))
    dropped = page_cache.renew([large])
    if dropped is not None:
        pytest.skip(dropped)
    with large.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"FilePmdMapped:\s+(\d+) kB", rollup)
    assert found is not None
    assert int(found[1]) < 2**12  # this process's own libraries may have some
