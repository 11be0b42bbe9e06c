"""One expert in every format: measured once, told with its command, beside another builder's model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exporters.models import make
from tests.pico import SENTENCES


@pytest.mark.slow
def test_every_type_is_measured_once(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense")
    expert = tmp_path / "expert"
    make(expert / "model", layout="per-layer")
    card = {"name": "pico", "base": {"id": str(dense), "parameters": 100_000}, "expert": {"parameters": 75_000}}
    (expert / "expert.json").write_text(json.dumps(card))
    (expert / ".stages").mkdir()
    row = {"text": "scenario", "documents": ["\n".join(SENTENCES * 40)]}
    (expert / ".stages" / "texts.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "cusprun.benchmarks.peers.exports", expert, "--types", "q4_0", "int4", "--builder"]
    command += ["--eval-tokens", "1024", "--repetitions", "2", "--work", tmp_path / "work", "--out", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["quality"]) == {"q4_0", "int4"}
    assert set(found["speed"]) == {"q4_0", "int4", "int4, output layer in 4 bits"}
    page = (tmp_path / "found.md").read_text()
    assert "python -m cusprun.benchmarks.peers.exports expert --types q4_0 int4" in page
    assert "onnxruntime-genai's builder" in page
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 3
    kept = (tmp_path / "found.json").read_bytes()
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(kept)["speed"] == json.loads((tmp_path / "found.json").read_bytes())["speed"]


def test_a_folder_that_no_build_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cusprun.benchmarks.peers.exports", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "name the folder that a build left" in done.stderr
