"""The real model through the export: the same numbers as torch, the same ids as the file it came from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cusprun.benchmarks.peers.limits import measure
from cusprun.dense import DEFAULT_MODEL, embedded_gguf, find_dense
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.proof import HARD_STRINGS, LIMITS, prove_gguf, tokenizer_difference
from cusprun.runtimes.llamacpp import LlamaCppRuntime
from cusprun.runtimes.torch_runtime import TorchRuntime

pytestmark = pytest.mark.slow

LICENCE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def dense() -> Path:
    return find_dense(DEFAULT_MODEL).folder


def test_tokenizer_is_the_published_one(dense: Path) -> None:
    texts = [*HARD_STRINGS, LICENCE.read_text()]
    assert tokenizer_difference(TorchRuntime(dense, context=64), LlamaCppRuntime(embedded_gguf()), texts) is None


@pytest.mark.parametrize(("quant", "largest_kld"), [("f32", 1e-6), ("q8_0", 0.02)])
def test_export_is_near_torch(dense: Path, tmp_path: Path, quant: str, largest_kld: float) -> None:
    report = export_gguf(dense, tmp_path / "smollm2.gguf", quant)
    assert (report.arch, report.tokenizer_pre, report.parameters) == ("llama", "smollm", 134_515_008)
    assert report.fallbacks == ()
    ids = TorchRuntime(dense, context=64).encode(LICENCE.read_text())
    proof = prove_gguf(report.path, dense, np.array(ids[:256]).reshape(2, 128))
    assert proof.tokenizer_equal
    assert proof.kld_mean < largest_kld
    assert proof.perplexity_artifact == pytest.approx(proof.perplexity_torch, rel=1e-5 if quant == "f32" else 0.03)


TIMED = """
import json, resource, subprocess, sys, time
start = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": time.monotonic() - start, "peak": peak}))
"""


@pytest.mark.alone
def test_export_keeps_to_its_bounds(dense: Path, tmp_path: Path) -> None:
    """A minute, and in no process more than twice the model's bytes; the proof beside torch included."""
    command = [sys.executable, "-m", "cusprun.cli", "export", dense, "--quant", "q4_0", "--out", tmp_path / "x.gguf"]
    done = subprocess.run([sys.executable, "-c", TIMED, *map(str, command)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["seconds"] <= 60
    assert found["peak"] <= 2 * (dense / "model.safetensors").stat().st_size


def test_what_rounding_costs_is_as_written(dense: Path, tmp_path: Path) -> None:
    written = json.loads(LIMITS.read_text())["types"]["q4_0"]["kld_mean"]
    assert measure(dense, "q4_0", tmp_path)["kld_mean"] == pytest.approx(written, rel=0.1)
