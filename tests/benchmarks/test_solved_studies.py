"""The studies of solved experts and of the frontier, small: what they write, and that nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def study(name: str, model: Path, text: Path, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"cusprun.benchmarks.peers.{name}", "--model", model, "--corpus", text]
    command += ["--tokens", 4096, "--repetitions", 2, "--work", tmp_path / "work", "--out", tmp_path / name, *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_predictions_stand_beside_what_came_out(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    first = study("solved", pico_model, own_text, tmp_path, "--wishes", 4)
    assert "times the speed it had when this device was measured" in first.stderr
    cells = json.loads((tmp_path / "solved.json").read_text())["cells"]
    assert list(cells) == ["--size 100MB --quant q8_0"]
    for cell in cells.values():
        assert cell["predicted"]["file_bytes"] == pytest.approx(cell["measured"]["file_bytes"], rel=0.01)
        assert cell["measured"]["decode_tps"] > 0
        assert cell["predicted"]["speedup"] > 0  # though only a size was asked for
    page = (tmp_path / "solved.md").read_text()
    assert "file_bytes: 1 of 1 predictions within 1%" in page
    assert "speedup: " in page
    assert "speed when the wish was solved" in page
    assert len((tmp_path / "solved.csv").read_text().splitlines()) == 2
    again = study("solved", pico_model, own_text, tmp_path, "--wishes", 4)
    assert "text" not in again.stderr.split("written")[0]
    assert json.loads((tmp_path / "solved.json").read_text())["cells"] == cells


def test_the_frontier_says_where_solved_experts_win(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    words = ("--experts", 1, "--types", "q8_0", "q4_0", "--no-speed", "--eval-tokens", 1024)
    study("frontier", pico_model, own_text, tmp_path, *words)
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert [row["kind"] for row in found["rows"]] == ["expert", "dense", "dense"]
    expert, _, dense = found["rows"]
    assert expert["file_bytes"] <= dense["file_bytes"]
    page = (tmp_path / "frontier.md").read_text()
    better = expert["bits_per_byte"][found["text"]] < dense["bits_per_byte"][found["text"]]
    assert f"bits per byte: the expert is {'' if better else 'not '}better." in page
    assert "no solved expert was built" in page
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    again = study("frontier", pico_model, own_text, tmp_path, *words)
    assert "refit" not in again.stderr
    assert json.loads((tmp_path / "frontier.json").read_text())["rows"] == found["rows"]
