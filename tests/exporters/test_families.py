"""Every family in the architecture of llama.cpp that holds it: f32 files answer as torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.imatrix import collect_imatrix, write_imatrix
from cusprun.exporters.proof import prove_gguf
from cusprun.runtimes.gguf_header import load_metadata
from tests.exporters.models import make, windows
from tests.exporters.test_parity import assert_equal, compare

# family, settings of the config, layout -> llama.cpp's architecture
FILES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "qwen3": ("qwen3", {}, "uniform", "qwen3"),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}, "uniform", "qwen3"),
    "qwen3, heads that are no hidden size": ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}, "uniform", "qwen3"),
    "qwen3, fewer heads": ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1}, "uniform", "qwen3"),
    "qwen3, per layer": ("qwen3", {}, "per-layer", "openelm"),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, "uniform", "smollm3"),
    "smollm3, untied, wide heads": (
        "smollm3",
        {"num_hidden_layers": 8, "tie_word_embeddings": False, "head_dim": 32},
        "uniform",
        "smollm3",
    ),
    "qwen3, per layer, wide heads": ("qwen3", {"head_dim": 32}, "per-layer", "openelm"),
}


@pytest.mark.parametrize("kind", FILES)
def test_f32_equals_torch(tmp_path: Path, kind: str) -> None:
    family, settings, layout, arch = FILES[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert (report.arch, load_metadata(report.path).architecture) == (arch, arch)
    found = compare(folder, tmp_path)
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8  # what float32 really leaves


@pytest.mark.parametrize("kind", ["qwen3", "qwen3, per layer"])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "iq3_m"])
def test_the_quantizer_takes_the_files(tmp_path: Path, kind: str, quant: str) -> None:
    """With an importance matrix, whose names have to be the file's."""
    family, settings, layout, _ = FILES[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    found = collect_imatrix(folder, {"text": windows(folder)})
    write_imatrix(tmp_path / "of.imatrix", found, ["text"])
    report = export_gguf(folder, tmp_path / "model.gguf", quant, imatrix=tmp_path / "of.imatrix")
    matrices = {name for name in report.types if name.startswith("blk.") and "norm" not in name}
    assert set(found.sums) - {"output.weight"} == matrices
    proof = prove_gguf(report.path, folder, windows(folder), threads=1)
    assert proof.kld_mean < (1e-2 if quant == "q8_0" else 1.0)


@pytest.mark.parametrize(
    ("family", "layout", "settings", "message"),
    [
        (
            "qwen3",
            "per-layer",
            {"tie_word_embeddings": False},
            "openelm holds no qwen3 of unequal layers with an output matrix",
        ),
        ("qwen3", "without-attention", {}, "openelm holds no qwen3 with layers whose attention is gone"),
        ("qwen3", "uniform", {"attention_bias": True}, "qwen3 holds no qwen3 with biases"),
        ("smollm3", "per-layer", {}, "has no architecture for tied smollm3 with widths of its own"),
        ("smollm3", "uniform", {"no_rope_layers": [1, 0, 1]}, "smollm3 holds no smollm3 whose layers without rotation"),
    ],
)
def test_what_no_architecture_holds_is_refused(
    tmp_path: Path, family: str, layout: str, settings: dict[str, Any], message: str
) -> None:
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    with pytest.raises(InvalidRequest, match=message):
        export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()
