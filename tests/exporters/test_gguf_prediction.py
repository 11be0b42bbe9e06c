"""What a file will be is known before it is written: llama.cpp's dry run against what llama.cpp then writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cusprun.errors import Failed
from cusprun.exporters.gguf import GgufExport, export_gguf
from cusprun.exporters.gguf_source import GgufSource
from cusprun.exporters.imatrix_file import Imatrix, write_imatrix
from cusprun.quants import TYPES, is_weighed
from cusprun.runtimes.gguf_header import load_metadata
from tests.exporters.models import make

# Rows that every block divides, and those of SmolLM2-135M, which blocks of 256 do not divide.
WIDTHS = {
    256: {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    576: {"hidden_size": 576, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 9},
}


@pytest.fixture(scope="module", params=[(256, True), (256, False), (576, True), (576, False)], ids=str)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    width, tied = request.param
    sizes = {"num_key_value_heads": 3 if width == 576 else 2, "num_hidden_layers": 4, **WIDTHS[width]}
    return make(tmp_path_factory.mktemp("prediction") / "pico", tie_word_embeddings=tied, **sizes)


def matrix_of_ones(folder: Path, path: Path) -> Path:
    """An importance matrix that weighs all columns alike."""
    shapes = GgufSource(folder, "x", {}).matrices()
    write_imatrix(path, Imatrix({name: np.ones(shape[1]) for name, shape in shapes.items()}, 1, 1), ["ones"])
    return path


@pytest.mark.parametrize("quant", TYPES)
def test_every_type_is_what_was_predicted(folder: Path, tmp_path: Path, quant: str) -> None:
    """With an importance matrix where one can be: llama.cpp's mixes differ by it. Without, see the next."""
    weighed = is_weighed(quant)
    predicted = GgufExport(folder, quant, name="x", weighed=weighed).prediction
    imatrix = matrix_of_ones(folder, tmp_path / "x.imatrix") if weighed else None
    report = export_gguf(folder, tmp_path / "x.gguf", quant, name="x", imatrix=imatrix)
    info = load_metadata(report.path)
    assert predicted.bytes == report.path.stat().st_size
    assert predicted.types == {tensor.name: tensor.type for tensor in info.tensors}
    assert predicted.type_counts == info.types
    fallen = {fallback.tensor: fallback.got for fallback in predicted.fallbacks}
    assert fallen == {name: report.types[name] for name in fallen}
    if info.hidden_size == 256 or quant == "auto":
        assert fallen == {}
    elif TYPES[quant].block == 256:
        assert len(fallen) >= 4 * 6  # of each layer all but down_proj, whose rows are of 512


@pytest.mark.parametrize("quant", ["q4_0", "iq4_nl"])
def test_the_mix_without_an_importance_matrix_is_another(folder: Path, tmp_path: Path, quant: str) -> None:
    predicted = GgufExport(folder, quant, name="x").prediction
    report = export_gguf(folder, tmp_path / "x.gguf", quant, name="x")
    assert (predicted.bytes, predicted.types) == (report.bytes, report.types)


def test_lines_name_count_columns_and_types(tmp_path: Path) -> None:
    folder = make(tmp_path / "pico", num_hidden_layers=1, intermediate_size=48, **{"hidden_size": 96})
    lines = GgufExport(folder, "q4_k_m").prediction.fallback_lines()
    assert lines[0] == "8 of 8 matrices fall back to another type:"
    assert "  48 columns do not divide by 32: q4_k_m -> f16 (1)" in lines
    assert any(line.startswith("  96 columns do not divide by 256: ") and "q4_k -> q5_0" in line for line in lines)


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "q4_0", "iq4_nl"])
def test_rows_that_no_block_divides_become_f16(tmp_path: Path, quant: str) -> None:
    folder = make(tmp_path / "pico", num_hidden_layers=1, hidden_size=72, intermediate_size=48)
    report = export_gguf(folder, tmp_path / "x.gguf", quant)
    assert {report.types[name] for name in ("token_embd.weight", "blk.0.ffn_down.weight")} == {"F16"}
    assert {"token_embd.weight", "blk.0.ffn_down.weight"} <= {fallback.tensor for fallback in report.fallbacks}


@pytest.mark.parametrize("hidden", [256, 96, 72])
@pytest.mark.parametrize("tied", [True, False])
def test_auto_never_falls_back(tmp_path: Path, hidden: int, tied: bool) -> None:
    folder = make(
        tmp_path / "pico", num_hidden_layers=2, hidden_size=hidden, intermediate_size=256, tie_word_embeddings=tied
    )
    report = export_gguf(folder, tmp_path / "x.gguf", "auto", overrides=[("blk.1.ffn_down", "q5_k")])
    assert report.fallbacks == ()
    rows = {256: ("Q6_K", "Q4_K"), 96: ("Q8_0", "IQ4_NL"), 72: ("F16", "F16")}[hidden]
    outer = [report.types[name] for name in ("token_embd.weight", "output.weight") if name in report.types]
    assert outer == [rows[0]] * (1 if tied else 2)
    assert {report.types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_v", "ffn_gate")} == {rows[1]}
    assert [report.types[f"blk.{layer}.ffn_down.weight"] for layer in (0, 1)] == ["Q4_K", "Q5_K"]
    assert load_metadata(report.path).quant == ("iq4_nl" if hidden == 96 else "q4_k_m")


@pytest.mark.parametrize("wrong", ["bytes", "types"])
def test_a_file_that_was_not_predicted_does_not_stay(folder: Path, tmp_path: Path, wrong: str) -> None:
    export = GgufExport(folder, "f16")
    changed = {"bytes": 1} if wrong == "bytes" else {"types": {**export.prediction.types, "output_norm.weight": "F16"}}
    export.__dict__["prediction"] = dataclasses.replace(export.prediction, **changed)  # type: ignore[arg-type]
    with pytest.raises(Failed, match="predicted"):
        export.write(tmp_path / "out" / "x.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_dry_run_prints_and_writes_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "pico", num_hidden_layers=1)
    command = [sys.executable, "-m", "cusprun.cli", "export", str(folder), "--quant", "q4_k_m"]
    command += ["--out", str(tmp_path / "out"), "--dry-run"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert not (tmp_path / "out").exists()
    report = export_gguf(folder, tmp_path / "x.gguf", "q4_k_m")
    assert (found["bytes"], found["arch"], sum(found["types"].values())) == (report.bytes, "llama", len(report.types))
    assert len(found["fallbacks"]) == len(report.fallbacks) > 0
    assert f"{report.bytes} bytes" in told
    assert "matrices fall back" in told
