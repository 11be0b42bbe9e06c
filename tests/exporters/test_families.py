"""Every family in the architecture of llama.cpp that holds it: f32 files answer as torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cusprun.benchmarks.cost import cost
from cusprun.checkpoint import load_model
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.imatrix import collect_imatrix
from cusprun.exporters.imatrix_file import write_imatrix
from cusprun.exporters.onnx import export_onnx
from cusprun.exporters.proof import check_graph, compare_on_windows, prove_gguf
from cusprun.runtimes.gguf_header import load_metadata
from cusprun.runtimes.llamacpp import LlamaCppRuntime
from tests.exporters.models import make, windows
from tests.exporters.test_parity import assert_equal, compare

SCALAR = {"query_pre_attn_scalar": 16}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
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
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 24}, "uniform", "gemma2"),
    "gemma2, wide heads": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
        "uniform",
        "gemma2",
    ),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "sliding_window": 24, "num_hidden_layers": 7},
        "uniform",
        "gemma3",
    ),
    "gemma3, other bases": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
        "uniform",
        "gemma3",
    ),
    "qwen3, scaled": ("qwen3", LINEAR, "uniform", "qwen3"),
    "qwen3, per layer, scaled": ("qwen3", LINEAR, "per-layer", "openelm"),
    "qwen3, per layer, wide heads": ("qwen3", {"head_dim": 32}, "per-layer", "openelm"),
}


@pytest.mark.parametrize("kind", FILES)
def test_f32_equals_torch(tmp_path: Path, kind: str) -> None:
    family, settings, layout, arch = FILES[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert (report.arch, load_metadata(report.path).architecture) == (arch, arch)
    found = compare(folder, tmp_path)
    if family.startswith("gemma"):  # see the next test
        assert found["tokenizer_difference"] is None
        assert found["kld_mean"] <= 1e-5
        return
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8  # what float32 really leaves


IN_ONNX = {
    **{kind: (family, settings, layout) for kind, (family, settings, layout, _) in FILES.items()},
    "qwen3, untied, per layer": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}, "per-layer"),
    "qwen3, without attention": ("qwen3", {}, "without-attention"),
    "smollm3, per layer": ("smollm3", {}, "per-layer"),
    "smollm3, rotation elsewhere": ("smollm3", {"no_rope_layers": [1, 0, 1]}, "uniform"),
    "gemma2, per layer": ("gemma2", {"query_pre_attn_scalar": 64, "sliding_window": 24}, "per-layer"),
    "gemma2, nothing capped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, "uniform"),
    "gemma3, per layer, capped": ("gemma3_text", {"final_logit_softcapping": 9.0, "sliding_window": 24}, "per-layer"),
}


@pytest.mark.parametrize("kind", IN_ONNX)
def test_fp32_onnx_equals_torch(tmp_path: Path, kind: str) -> None:
    family, settings, layout = IN_ONNX[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    report = export_onnx(folder, tmp_path / "onnx", "fp32")
    assert cost(report.path).parameters == cost(folder).parameters == report.parameters
    np.save(tmp_path / "windows.npy", windows(folder))
    check_graph(str(report.path))
    found = compare_on_windows(str(report.path), str(folder), str(tmp_path / "windows.npy"), "fp32", 1)
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("quant", ["fp16", "int8"])
def test_quantized_onnx_is_near_torch(tmp_path: Path, kind: str, quant: str) -> None:
    family, settings, layout = IN_ONNX[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    export_onnx(folder, tmp_path / "onnx", quant)
    np.save(tmp_path / "windows.npy", windows(folder))
    found = compare_on_windows(str(tmp_path / "onnx"), str(folder), str(tmp_path / "windows.npy"), quant, 1)
    assert found["kld_mean"] <= (1e-3 if quant == "fp16" else 0.2)


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp computes it on a CPU: from a table of 16-bit values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind.startswith("gemma")])
def test_all_that_gemma_differs_by_is_the_table_of_gelu(tmp_path: Path, kind: str) -> None:
    """Beyond the window too: it has 24 tokens in most of these, and the text 64."""
    family, settings, layout, _ = FILES[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    ids = windows(folder)[0]
    runtime = LlamaCppRuntime(report.path, context=len(ids), threads=1, exact=True)
    found = torch.from_numpy(np.asarray(runtime.logits(ids.tolist()))).log_softmax(-1)
    model = load_model(folder)
    for layer in model.model.layers:
        layer.mlp.act_fn = TableGelu()
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) <= 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "qwen3, per layer"])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "iq3_m"])
def test_the_quantizer_takes_the_files(tmp_path: Path, kind: str, quant: str) -> None:
    """With an importance matrix, whose names have to be the file's."""
    family, settings, layout, _ = FILES[kind]
    folder = make(tmp_path / "model", family=family, layout=layout, **settings)
    found = collect_imatrix(folder, {"text": windows(folder)})
    write_imatrix(tmp_path / "of.imatrix", found, ["text"])
    matrix = None if quant == "q8_0" else tmp_path / "of.imatrix"
    report = export_gguf(folder, tmp_path / "model.gguf", quant, imatrix=matrix)
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
            "openelm holds no qwen3 with an output matrix of its own: prune it with --layout uniform",
        ),
        ("qwen3", "without-attention", {}, "openelm holds no qwen3 with layers whose attention is gone"),
        ("qwen3", "uniform", {"attention_bias": True}, "qwen3 holds no qwen3 with biases"),
        ("gemma2", "uniform", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is not its head_dim"),
        ("gemma2", "uniform", {**SCALAR, "final_logit_softcapping": None}, "gemma2 without a cap of the logits"),
        ("gemma2", "uniform", {**SCALAR, "attn_logit_softcapping": None}, "without a cap of the attention's scores"),
        ("gemma2", "uniform", {**SCALAR, "layer_types": ["full_attention"] * 3}, "whose sliding layers stand else"),
        ("gemma2", "uniform", {**SCALAR, "tie_word_embeddings": False}, "with an output matrix of its own: tie it"),
        ("gemma3_text", "uniform", {**SCALAR, "final_logit_softcapping": 9.0}, "gemma3_text with a cap of the logits"),
        ("gemma3_text", "per-layer", SCALAR, "has no architecture for tied gemma3_text with widths of its own"),
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
