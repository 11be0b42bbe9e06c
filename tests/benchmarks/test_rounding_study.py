"""One expert in four bits, rounded in every way: measured once, told with its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_text
from tests.test_build import QUICK, run


@pytest.mark.slow
def test_every_rounding_is_measured_once(tmp_path: Path, pico_model: Path) -> None:
    text = write_text(tmp_path / "text.txt", sentences=1600, seed=7)
    expert = tmp_path / "expert"
    run("build", "--model", pico_model, "--corpus", text, *QUICK, "--out", expert)
    command = [sys.executable, "-m", "cusprun.benchmarks.peers.rounding", expert, "--types", "q4_0", "int4"]
    command += ["--eval-tokens", "1024", "--work", tmp_path / "work", "--out", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "found.json").read_text())["cells"]
    names = ["f16/none", "fp32/none", "q4_0/nearest", "q4_0/imatrix", "q4_0/gptq", "int4/nearest", "int4/gptq"]
    assert list(cells) == [f"{side}/{name}" for side in ("dense", "expert") for name in names]
    for side in ("dense", "expert"):
        for quant in ("q4_0", "int4"):
            ways = [cells[f"{side}/{quant}/{way}"] for way in ("nearest", "gptq")]
            assert ways[0]["bytes"] == ways[1]["bytes"]
            assert ways[0]["texts"] != ways[1]["texts"]
    assert "python -m cusprun.benchmarks.peers.rounding expert --types q4_0 int4" in (tmp_path / "found.md").read_text()
    rows = (tmp_path / "found.csv").read_text().splitlines()
    assert len(rows) == 1 + len(cells)
    kept = json.loads((tmp_path / "found.json").read_bytes())["cells"]
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "layer by layer" not in again.stderr
    assert kept == json.loads((tmp_path / "found.json").read_bytes())["cells"]
