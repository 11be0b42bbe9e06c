"""`cusprun-edge bench` from flags to files: sizes, sweeps, llama-bench's columns, going on after an interrupt."""

from __future__ import annotations

import csv
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from cusprun.benchmarks import energy, page_cache, run_once
from cusprun.benchmarks.bandwidth import measure_copy
from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.llama_bench import OURS, THEIRS
from cusprun.benchmarks.request import Request, measure
from cusprun.benchmarks.sizes import FULL, MAIN, Run, Sizes, choose
from cusprun.benchmarks.speed import bench
from cusprun.benchmarks.speed_table import bench_tables
from cusprun.benchmarks.tables import as_text
from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import default_threads, open_runtime
from cusprun.runtimes.child import run_in_child

# `llama-bench -o csv` of llama.cpp b5163 (tools/llama-bench/README.md), what is set by its own flags left out
LLAMA_BENCH = ("cpu_info", "backends", "model_filename", "model_type", "model_size", "model_n_params", "n_threads",
               "type_k", "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
               "stddev_ts")  # fmt: skip


@pytest.fixture(scope="module")
def swept(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole bench of a file against the same file, at one thread and two."""
    out = tmp_path_factory.mktemp("bench")
    other = out / "dense.gguf"
    other.symlink_to(gguf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSPRUN_CACHE", str(out / "cache"))
        found = measure(
            Request([gguf], other, prefill="8,32", decode="4", depth="0,64", threads="1,2", repetitions=2,
                    csv=out / "bench.csv", md=out / "bench.md")
        )  # fmt: skip
    return {"found": found, "out": out, "gguf": gguf}


def test_a_sweep_gives_a_row_each(swept: dict[str, Any]) -> None:
    found, gguf = swept["found"], swept["gguf"]
    names = [str(gguf), str(swept["out"] / "dense.gguf")]
    assert [(row["threads"], row["artifact"]) for row in found["rows"]] == [(n, name) for n in (1, 2) for name in names]
    assert [(one["threads"], one["artifact"]) for one in found["comparisons"]] == [(1, names[0]), (2, names[0])]
    for row in found["rows"]:
        assert [test["test"] for test in row["tests"]] == ["pp8", "tg4", "pp32", "tg4 @ d64"]
        assert all(test["tps"]["n"] == len(test["samples_s"]) == 2 for test in row["tests"])
        assert [test["context"] for test in row["tests"]] == [8, 8, 32, 68]
        deep = row["tests"][3]
        assert deep["bandwidth_bytes_per_s"] == pytest.approx(
            deep["tps"]["mean"] * (row["weight_bytes"] + 65.5 * row["kv_bytes_per_token"])
        )
        assert deep["bandwidth_share"] == pytest.approx(deep["bandwidth_bytes_per_s"] / row["copy_bytes_per_s"])
        assert row["prefill_tps"] == row["tests"][0]["tps"]
        assert 0 < row["load_s"] < row["ready_s"] < 5
        assert row["stopped"] == "2 rounds, as asked"
    assert set(found["ratios"]["tests"]) == {"pp8", "tg4", "pp32", "tg4 @ d64"}


def test_columns_are_llama_bench_s(swept: dict[str, Any]) -> None:
    with (swept["out"] / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == (*LLAMA_BENCH, *OURS)
    assert THEIRS == LLAMA_BENCH
    assert len(lines) == 2 * 2 * 4
    row, first, deep = swept["found"]["rows"][0], lines[0], lines[3]
    assert (first["n_prompt"], first["n_gen"], first["n_depth"], first["test"]) == ("8", "0", "0", "pp8")
    assert (deep["n_prompt"], deep["n_gen"], deep["n_depth"], deep["test"]) == ("0", "4", "64", "tg4 @ d64")
    assert float(first["avg_ts"]) == row["tests"][0]["tps"]["mean"]
    assert float(first["avg_ns"]) == pytest.approx(1e9 * sum(row["tests"][0]["samples_s"]) / 2, abs=1)
    assert int(first["model_n_params"]) == row["parameters"]
    assert int(first["model_size"]) < row["file_bytes"]
    assert first["type_k"] == "f16"
    page = (swept["out"] / "bench.md").read_text()
    assert "| model | size | params | backend | threads | test | t/s |" in page
    assert page.count("tg4 @ d64 |") == 4 + 4
    for table in [block for block in page.split("\n\n") if block.startswith("|")]:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_tables_fit(swept: dict[str, Any]) -> None:
    text = "\n".join(as_text(grid) for grid in bench_tables(swept["found"]))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "Tests, 2 threads, 2 rounds" in text
    assert "tg4 @ d64" in text
    where = swept["found"]["environment"]
    for told in (where["cpu"].split()[0], where["instruction_sets"][0], where["versions"]["llama-cpp-python"]):
        assert told in text


def test_what_is_measured_where_nothing_is_asked(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(paths: list[Path], **settings: Any) -> Any:
        raise Asked(settings)

    monkeypatch.setattr("cusprun.benchmarks.request.bench", asked)
    with pytest.raises(Asked) as found:
        measure(Request([gguf]))
    settings = found.value.args[0]
    assert settings["default"] == Sizes((128, 512, 2048), (128,), (0, 2048))
    assert (settings["until"], settings["max_seconds"], settings["repetitions"]) == (0.02, 600, None)
    assert settings["cold"]
    assert settings["copy"]
    assert settings["threads"] is None
    with pytest.raises(Asked) as found:
        measure(Request([gguf], repetitions=3))
    assert (found.value.args[0]["until"], found.value.args[0]["max_seconds"]) == (None, None)


def test_threads_are_physical_cores_by_default() -> None:
    cores = psutil.cpu_count(logical=False) or 1
    assert default_threads() == min(cores, len(psutil.Process().cpu_affinity()))


def test_cold_loads_are_told_apart_and_files_are_read_anew(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[list[Path]] = []

    def renew(files: Any) -> None:
        renewed.append(list(files))
        page_cache_renew(files)

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        found = run_in_child(function, *args, **kwargs)
        return {**found, "load_s": 77.0, "ready_s": 78.0, "cold_note": None} if kwargs.get("cold") else found

    page_cache_renew = page_cache.renew
    monkeypatch.setattr(page_cache, "renew", renew)
    monkeypatch.setattr("cusprun.benchmarks.speed.run_in_child", watched)
    (row,) = bench([gguf], prefill=8, decode=4, depth=0, repetitions=2, threads=1, cold=True)
    assert (row.load_cold_s, row.ready_cold_s) == (77, 78)
    assert row.samples["load_cold_s"] == [77, 77]
    assert row.load_s < 5
    assert renewed == [[gguf]] * 3  # before the first round, and after each cold load


def test_a_cold_run_drops_the_file_before_it_loads(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("drop", "fill"):
        monkeypatch.setattr(page_cache, name, partial(lambda name, files: steps.append(name), name))

    def load(*args: Any, **settings: Any) -> Any:
        steps.append("load")
        return open_runtime(*args, **settings)

    monkeypatch.setattr(run_once, "open_runtime", load)
    for cold in (True, False):
        run_once.measure(str(gguf), prefill=4, decode=2, threads=1, cold=cold)
    assert steps == ["drop", "load", "fill", "load"]


def test_the_machine_is_named() -> None:
    found = environment()
    assert found["cpu"]
    assert found["instruction_sets"] == sorted(set(found["instruction_sets"]), key=found["instruction_sets"].index)
    assert found["last_level_cache_bytes"] is None or found["last_level_cache_bytes"] >= 2**15


def test_an_interrupted_bench_goes_on(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []
    stop_at = 3

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.append((kwargs["seed"], kwargs["prefill"]))
        return run_in_child(function, *args, **kwargs)

    monkeypatch.setattr("cusprun.benchmarks.speed.run_in_child", watched)
    kept = tmp_path / "kept"

    def run(decode: int = 4) -> Any:
        return bench([gguf], prefill=[8, 16], decode=decode, repetitions=2, threads=1, kept=kept)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert ran == [(0, 8), (0, 16), (1, 8)]
    first = [json.loads(line)[1] for path in kept.glob("*.jsonl") for line in path.read_text().splitlines()]
    ran.clear()
    rows = run()
    assert ran == [(1, 16)]
    assert rows[0].tests[0].samples_s == [first[0]["prefill_s"], first[2]["prefill_s"]]
    ran.clear()
    stop_at = 4
    run()
    assert len(ran) == 4  # a finished one measures anew
    ran.clear()
    stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run()
    ran.clear()
    stop_at = 4
    run(decode=5)
    assert len(ran) == 4  # other settings share nothing
    for path in kept.glob("*.jsonl"):
        os.utime(path, (time.time() - 90000,) * 2)
    ran.clear()
    run()
    assert len(ran) == 4  # yesterday's runs are of another day


def test_ctrl_c_on_the_command_line(gguf: Path, tmp_path: Path) -> None:
    """Ended in the middle, no child is left, the same command goes on and says so; and it is not run twice at once."""
    arguments = [sys.executable, "-m", "cusprun.cli", "bench", str(gguf), "--prefill", "8", "--decode", "4", "--depth",
                 "0", "--repetitions", "4", "--threads", "1", "--json"]  # fmt: skip
    environment = {**os.environ, "CUSPRUN_CACHE": str(tmp_path)}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob("bench/*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert (second.returncode, "running already" in second.stderr) == (2, True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert json.loads(done.stdout)["rows"][0]["decode_tps"]["n"] == 4
    assert not list(tmp_path.glob("bench/*"))


def test_rounds_end_when_they_are_precise_or_late(gguf: Path) -> None:
    found = bench([gguf], prefill=8, decode=4, repetitions=None, until=0.9, threads=1)[0]
    assert found.rounds == 10
    assert "below 90.0%" in found.stopped
    found = bench([gguf], prefill=8, decode=4, repetitions=None, until=1e-6, max_seconds=1.5, threads=1)[0]
    assert found.rounds < 10
    assert "time limit of 2 s" in found.stopped


def test_sizes_that_fit_and_sizes_that_do_not() -> None:
    none = {"prefill": None, "decode": None, "depth": None}
    assert choose(none, FULL, {"a": 8192}) == FULL
    assert choose(none, FULL, {"a": 512, "b": 8192}).runs() == [Run(512, 128, 0, 512), Run(prefill=128)]
    assert choose(none, MAIN, {"a": 64}).runs() == [Run(64, 64, 0, 64)]
    assert FULL.runs() == [
        Run(512, 128, 0, 512), Run(prefill=128), Run(prefill=2048), Run(decode=128, depth=2048)
    ]  # fmt: skip
    with pytest.raises(InvalidRequest) as error:
        choose({"prefill": [600], "decode": None, "depth": [0, 500]}, FULL, {"short": 512, "long": 8192})
    assert str(error.value) == (
        "- --prefill 600: short holds 512 tokens; write 512 or less\n"
        "- --depth 500 and --decode 128 after it: short holds 512 tokens; write --depth 384 or less"
    )
    with pytest.raises(InvalidRequest, match="--decode 513: short holds 512 tokens; write 512 or less"):
        choose({**none, "decode": [513]}, FULL, {"short": 512})
    with pytest.raises(InvalidRequest, match=r"(?s)--prefill 0: write 1 or more.*--depth -1: write 0 or more"):
        choose({"prefill": [0], "decode": None, "depth": [-1]}, FULL, {"short": 512})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prefill": "12x", "until": "often"}, ["--prefill 12x: write whole numbers", "--until often: write a share"]),
        (
            {"threads": "--5", "prefill": "²", "decode": "٣", "depth": "-"},
            ["--threads --5: write whole numbers", "--prefill ²: write", "--decode ٣: write", "--depth -: write"],
        ),
        ({"prefill": "9" * 5000}, ["write whole numbers with commas"]),
        ({"threads": "-5"}, ["--threads -5: write 1 or more"]),
        ({"until": "2%", "repetitions": 3}, ["write one of them"]),
        ({"until": "200%"}, ["--until 2: write a share between 0 and 1"]),
        ({"threads": "0,1", "max_seconds": 0.0}, ["--threads 0: write 1 or more", "--max-seconds 0: write more"]),
        ({"csv": Path("/")}, ["--csv / is a folder"]),
    ],
)
def test_flags_that_make_no_sense(flags: dict[str, Any], words: list[str], gguf: Path) -> None:
    with pytest.raises(InvalidRequest) as error:
        measure(Request([gguf], **flags))
    assert all(word in str(error.value) for word in words)


def test_cache_bytes_are_what_the_runtimes_hold(gguf: Path, folder: Path, onnx: Path) -> None:
    import llama_cpp

    tokens = list(range(3, 67))
    assert cost(gguf).kv_bytes_per_token == 3 * 2 * 2 * 16 * 2  # layers, k and v, kv heads, head_dim, f16
    llama = open_runtime(gguf, context=128, threads=1)
    sizes = []
    for count in (32, 64):
        llama.prefill(tokens[:count])
        sizes.append(llama_cpp.llama_state_seq_get_size(llama._context, 0))
    assert 0 <= (sizes[1] - sizes[0]) / 32 - cost(gguf).kv_bytes_per_token <= 16  # a cell's position goes with it
    torch = open_runtime(folder, context=128, threads=1)
    torch.prefill(tokens)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in torch._cache.layers)
    assert held == 64 * cost(folder).kv_bytes_per_token
    graph = open_runtime(onnx, context=128, threads=1)
    held = sum(value.numpy().nbytes for value in graph._session._cache.values())
    assert held == 128 * cost(onnx).kv_bytes_per_token
    assert (cost(folder).kv_type, cost(onnx).context) == ("f32", 512)
    assert cost(folder).weight_bytes == 4 * cost(folder).macs_per_token == cost(gguf).weight_bytes
    assert 0.5 < cost(onnx).weight_bytes / cost(onnx).macs_per_token < 1.2  # four bits and scales, the output in eight


def test_cold_files_are_not_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**22))
    page_cache.fill([path])
    assert page_cache.resident_share([path]) == 1
    note = page_cache.drop([path])
    assert note is None or "stayed in the page cache" in note  # tmpfs keeps what it holds
    assert page_cache.resident_share([path]) == 0 or note is not None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert sum(held[:: mmap.PAGESIZE]) > 0
        assert "stayed in the page cache: another process" in (page_cache.drop([path]) or "")


def test_copy_bandwidth() -> None:
    found = measure_copy(2, buffer_bytes=2**24, passes=5)
    assert len(found["samples"]) == 5
    assert max(found["samples"]) == found["bytes_per_s"] > 1e8
    assert "2 threads" in found["how"]


def test_energy_is_counted_where_the_machine_does(tmp_path: Path) -> None:
    assert "reports no energy" in energy.open_meter("cpu", tmp_path).note
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("9000000\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")
    meter = energy.open_meter("cpu", tmp_path)
    before = meter.read()
    (zone / "energy_uj").write_text("500000\n")  # it went over the end
    assert meter.joules(before, meter.read()) == pytest.approx(1.5)
    silent = energy.open_meter("cpu", tmp_path / "nothing")
    assert silent.joules(silent.read(), silent.read()) is None


def test_a_cache_that_was_not_filled_is_no_figure(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cusprun.benchmarks import run_once
    from cusprun.runtimes.llamacpp import LlamaCppRuntime

    step = LlamaCppRuntime.step

    def lost(runtime: LlamaCppRuntime, token: int) -> Any:
        found = step(runtime, token)
        runtime.forget(len(runtime._cached) - 1)
        return found

    monkeypatch.setattr(LlamaCppRuntime, "step", lost)
    with pytest.raises(Failed, match="the cache holds 32 tokens after 32 and 4 more"):
        run_once.measure(str(gguf), prefill=0, decode=4, depth=32, threads=1)
