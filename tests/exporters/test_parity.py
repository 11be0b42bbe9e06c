"""llama.cpp computes what torch computes: the one test that an exporter cannot cheat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cusprun.anatomy import describe
from cusprun.compact import compact
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.proof import compare_on_windows, prove_gguf
from cusprun.plan import LayerPlan, make_plan
from cusprun.quants import TYPES
from cusprun.runtimes.gguf_header import load_metadata
from cusprun.runtimes.llamacpp import LlamaCppRuntime
from cusprun.runtimes.torch_runtime import TorchRuntime
from tests.exporters.models import make, windows
from tests.test_structure import write_biases

BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def compare(folder: Path, out: Path, quant: str = "f32") -> dict[str, Any]:
    report = export_gguf(folder, out / f"{quant}.gguf", quant)
    saved = out / "windows.npy"
    np.save(saved, windows(folder))
    return compare_on_windows(str(report.path), str(folder), str(saved), quant, 1)


def assert_equal(found: dict[str, Any]) -> None:
    assert found["tokenizer_difference"] is None
    assert found["top1_agreement"] >= 0.999
    assert found["kld_mean"] <= 1e-4


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("attention", ["gqa", "mha"])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_f32_equals_torch(tmp_path: Path, layout: str, tied: bool, attention: str, biases: dict[str, bool]) -> None:
    folder = make(tmp_path / "model", layout=layout, attention=attention, tie_word_embeddings=tied, **biases)
    found = compare(folder, tmp_path)
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8  # what float32 really leaves
    assert found["perplexity_artifact"] == pytest.approx(found["perplexity_torch"], rel=1e-4)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_mistral_equals_torch(tmp_path: Path, layout: str) -> None:
    assert_equal(compare(make(tmp_path / "model", layout=layout, family="mistral", sliding_window=None), tmp_path))


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize(
    "rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}], ids=["llama3", "linear"]
)
def test_rope_scaling_equals_torch(tmp_path: Path, layout: str, rope: dict[str, Any]) -> None:
    assert_equal(compare(make(tmp_path / "model", layout=layout, rope_parameters=rope), tmp_path))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_layers_without_attention_equal_torch(tmp_path: Path, family: str, biases: dict[str, bool]) -> None:
    """Mistral has no biases of its own: an expert that was given some is a deci file like Llama's."""
    extra = {"sliding_window": None} if family == "mistral" else {}
    folder = make(tmp_path / "model", layout="without-attention", family=family, **extra, **biases)
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    info = load_metadata(report.path)
    assert report.arch == "deci"
    assert [layer.heads for layer in info.layers] == [4, 0, 2, 0, 0]
    assert report.parameters == describe(folder).parameters
    assert "blk.1.attn_norm.weight" not in report.types
    assert ("blk.3.ffn_down.bias" in report.types) == bool(biases)
    found = compare(folder, tmp_path)
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8
    ids = windows(folder)[0].tolist()
    runs = [
        LlamaCppRuntime(report.path, context=64, threads=1, exact=True),
        TorchRuntime(folder, context=64, threads=1),
    ]
    np.testing.assert_allclose(*[run.logits(ids) for run in runs], atol=1e-4, rtol=0)
    for quant in ("q8_0", "q4_0"):
        assert compare(folder, tmp_path, quant)["kld_mean"] < 1.0


def test_compacted_layers_and_biases_equal_torch(tmp_path: Path) -> None:
    """A whole layer and an attention block cut out of a dense model, and biases that compensate for what went."""
    folder = make(tmp_path / "dense", num_hidden_layers=4)
    anatomy = describe(folder)
    whole, some = LayerPlan(tuple(range(128)), (0, 1)), tuple(range(0, 128, 2))
    layers = (whole, LayerPlan((), ()), LayerPlan(some, ()), LayerPlan(some, (1,)))
    plan = make_plan(anatomy, layers, attention_bias=True, mlp_bias=True)
    write_biases(tmp_path / "refitted", anatomy, [0, 3])
    compact(folder, plan, tmp_path / "expert", refitted=tmp_path / "refitted")
    assert_equal(compare(tmp_path / "expert", tmp_path))


def test_whole_layers_alone_stay_llama(tmp_path: Path) -> None:
    folder = make(tmp_path / "dense", num_hidden_layers=4)
    whole = LayerPlan(tuple(range(128)), (0, 1))
    compact(folder, make_plan(describe(folder), (whole, LayerPlan((), ()), whole, whole)), tmp_path / "expert")
    report = export_gguf(tmp_path / "expert", tmp_path / "model.gguf", "f32")
    assert (report.arch, len(load_metadata(report.path).layers)) == ("llama", 3)
    assert_equal(compare(tmp_path / "expert", tmp_path))


def test_wrong_rope_is_noticed(tmp_path: Path) -> None:
    """The comparison is sharp enough: the same weights with another rope base fail it."""
    from tests.exporters.models import edit_config

    folder = make(tmp_path / "model")
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    np.save(tmp_path / "windows.npy", windows(folder))
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    found = compare_on_windows(str(report.path), str(folder), str(tmp_path / "windows.npy"), "f32", 1)
    assert found["kld_mean"] > 1e-2


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("quant", [name for name, kind in TYPES.items() if name != "f32" and not kind.needs_imatrix])
def test_rounded_types_stay_near(tmp_path: Path, layout: str, quant: str) -> None:
    found = compare(make(tmp_path / "model", layout=layout, attention_bias=True), tmp_path, quant)
    limit = {"f16": 1e-4, "q8_0": 1e-2}.get(quant, 1.0)
    assert found["kld_mean"] < limit
    if quant == "f16":
        assert found["top1_agreement"] >= 0.995


def test_prove_runs_in_a_child(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    proof = prove_gguf(report.path, folder, windows(folder), threads=1)
    assert proof.top1_agreement >= 0.999
    assert proof.kld_mean <= 1e-4
    assert proof.tokenizer_equal
    assert (proof.tokens, proof.bytes, proof.tensors) == (192, report.bytes, len(report.types))
