"""The table of formats: whole, and still what its command finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.exporters.matrix import GENAI, LAYOUTS, MODELS, TYPES, Matrix, measure

PAGE = Path(__file__).parents[2] / "docs" / "results" / "formats.md"
CELLS = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))["cells"]
COLUMNS = [*TYPES, GENAI]


def test_no_cell_is_missing() -> None:
    """Every family in every layout and type has a figure or the reason why there is none, on the page too."""
    assert list(CELLS) == [f"{name}/{layout}" for name in MODELS for layout in LAYOUTS]
    assert all(list(row) == COLUMNS for row in CELLS.values())
    page = PAGE.read_text(encoding="utf-8")
    matrix = Matrix(CELLS)
    for row in matrix.rows():
        assert "| " + " | ".join(row) + " |" in page
    for reason in matrix.reasons():
        assert reason
        assert f". {reason}\n" in page
    assert sum("reason" not in cell for row in CELLS.values() for cell in row.values()) > len(CELLS) * 4


def test_the_figures_are_good() -> None:
    for name, row in CELLS.items():
        gelu = name.startswith("gemma")  # llama.cpp reads it from a table of 16-bit values
        for column, least, most in (("f32", 0.99 if gelu else 0.999, 1e-5 if gelu else 1e-8), ("fp32", 0.999, 1e-8)):
            if "reason" not in row[column]:
                assert row[column]["top1_agreement"] >= least, (name, column)
                assert row[column]["kld_mean"] <= most, (name, column)
        if "reason" not in row[GENAI]:
            assert row[GENAI]["same"] == row[GENAI]["said"], name


@pytest.mark.parametrize("name", ["llama, untied, biases/per-layer", "qwen3, untied/per-layer", "gemma2/uniform"])
def test_a_row_is_what_its_command_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", "")  # set by measure and put back
    model, _, layout = name.rpartition("/")
    found = measure(model, layout)
    for column, cell in CELLS[name].items():
        if "reason" in cell or "same" in cell:
            assert found[column] == cell, column
        else:
            assert found[column]["kld_mean"] == pytest.approx(cell["kld_mean"], rel=0.25, abs=1e-6), column
