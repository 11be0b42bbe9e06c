"""The study of recovery at tiny size: every arm through the real command line, and what it leaves to read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cusprun.benchmarks.peers.recovery import ARMS, main, tokens_in
from cusprun.benchmarks.tally import percent
from cusprun.errors import Failed
from cusprun.recover import TOKENS


def test_every_arm_is_measured_and_kept(
    pico_model: Path, own_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "recovery"
    words = [
        "--out", str(out), "--work", str(tmp_path / "work"), "--model", str(pico_model), "--corpus", str(own_text),
        "--minutes", "0.01", "--tokens", "2048", "--window", "64", "--eval-tokens", "1024", "--learning-rate", "0.01",
    ]  # fmt: skip
    main(words)
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    cells = found["cells"]
    assert list(cells) == list(ARMS)
    assert cells["prune"]["parameters"] == cells["prune + LoRA"]["parameters"] < cells["dense"]["parameters"]
    assert cells["LoRA"]["parameters"] == cells["dense"]["parameters"]
    for arm, (kind, _) in ARMS.items():
        assert (cells[arm]["recovery"] or {}).get("kind") == kind
        assert all(quality["bits_per_byte"] > 0 for quality in cells[arm]["quality"].values())
    read = {arm: cell["quality"]["scenario"]["bits_per_byte"] for arm, cell in cells.items()}
    assert read["LoRA"] < read["dense"]
    with out.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["text"]) for row in rows] == [
        (arm, text) for arm in ARMS for text in cells["dense"]["quality"]
    ]
    assert float(rows[0]["increase"]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {arm} |" in page for arm in ARMS)
    assert "`python -m cusprun.benchmarks.peers.recovery --minutes 0.01 --model pico-llama" in page
    assert "--learning-rate 0.01`" in page
    nats = {arm: np.array(cell["nats"]["scenario"]) for arm, cell in cells.items()}
    assert sum(nats["LoRA"]) / sum(nats["dense"]) == pytest.approx(read["LoRA"] / read["dense"])
    drawn = np.random.default_rng(0).integers(len(nats["dense"]), size=(2000, len(nats["dense"])))
    spread = (nats["LoRA"][drawn].sum(1) / nats["dense"][drawn].sum(1)).std()  # bootstrap over windows
    (row,) = [row for row in rows if (row["arm"], row["text"]) == ("LoRA", "scenario")]
    assert float(row["increase_stderr"]) == pytest.approx(spread, rel=0.2)
    assert f"LoRA {percent(float(row['increase']), float(row['increase_stderr']))}" in page

    del cells["prune + distill"]  # as where it was interrupted before the last arm
    out.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")
    capfd.readouterr()
    main(words)
    said = capfd.readouterr().err
    assert said.count("measured before, kept") == 4
    again = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert {arm: again["cells"][arm] for arm in cells} == cells
    assert set(again["cells"]) == set(ARMS)


def test_what_cannot_be_pruned_is_told_once(
    pico_model: Path, own_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--model", str(pico_model)]
    with pytest.raises(SystemExit) as left:
        main([*words, "--corpus", str(own_text), "--ratio", "0.99"])
    assert left.value.code == Failed("").exit_code
    said = capfd.readouterr().err
    assert "what it said stands above" in said
    assert "Traceback" not in said


def test_time_becomes_tokens() -> None:
    assert tokens_in(30.0, 60.0, 512) == TOKENS // 2
    assert tokens_in(0.0, 60.0, 512) == 4 * 512
