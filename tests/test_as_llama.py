"""Qwen2 and Phi-3 read as Llama: the same logits, in torch and in llama.cpp, before and after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cusprun.anatomy import describe
from cusprun.as_llama import as_llama, llama_config
from cusprun.checkpoint import load_model
from cusprun.dense import find_dense
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.proof import prove_gguf
from cusprun.inspection import describe_model
from tests import pico

IDS = np.random.default_rng(1).integers(3, 400, (3, 48))
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "phi3": ("phi3", {"tie_word_embeddings": False, "sliding_window": None}),
    "phi3, sliding": ("phi3", {"tie_word_embeddings": False, "sliding_window": 16}),
}


@pytest.fixture(params=MODELS, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    family, settings = MODELS[request.param]
    return pico.save_model(tmp_path / family, family, **settings)


def logits(model: Any, ids: np.ndarray = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.from_numpy(ids)).logits
    return found


def test_the_logits_stay(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = as_llama(folder)
    assert written != folder
    assert written == as_llama(folder)  # written once
    torch.testing.assert_close(logits(load_model(written)), logits(original), rtol=1e-5, atol=1e-5)


def test_llama_cpp_computes_the_same(folder: Path, tmp_path: Path) -> None:
    dense = find_dense(str(folder))
    # Not "phi3": by that name llama.cpp looks for special tokens of Phi-3's own tokenizer.
    report = export_gguf(dense.folder, tmp_path / "x.gguf", "f32", name="small")
    ids = IDS[:, :16]  # within the sliding window, which llama.cpp cannot slide
    proof = prove_gguf(report.path, dense.folder, ids, threads=1)
    assert proof.kld_mean < 1e-4
    assert proof.top1_agreement >= 0.999


def test_inspect_tells_the_family(folder: Path) -> None:
    found = describe_model(str(folder))
    assert found["family"] == json.loads((folder / "config.json").read_text())["model_type"]
    assert found["read_as"] in ("llama", "mistral")
    assert found["parameters"] == sum(p.numel() for p in load_model(as_llama(folder)).parameters())


def test_the_source_is_remembered(folder: Path) -> None:
    dense = find_dense(str(folder))
    assert dense.bytes == (folder / "model.safetensors").stat().st_size
    assert describe(dense.folder) == dense.anatomy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope scaling 'longrope'"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "rotates 0.75 of each head"),
        ({"model_type": "phi3", "hidden_size": "wide"}, "hidden_size must be a positive integer"),
    ],
)
def test_variants_that_no_llama_computes(change: dict[str, Any], message: str) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, **change}
    with pytest.raises(InvalidRequest, match=message):
        llama_config(config, "folder")


def test_others_come_back_as_they_are(pico_model: Path) -> None:
    config = json.loads((pico_model / "config.json").read_text())
    assert llama_config(config, "folder") is config
    assert as_llama(pico_model) == pico_model


def test_fused_matrices_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    folder = pico.save_model(tmp_path / "phi3", "phi3", tie_word_embeddings=False, sliding_window=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    with pytest.raises(InvalidRequest, match=r"qkv_proj\.weight has 128 rows; config\.json says 192"):
        as_llama(folder)
    assert not list((tmp_path / "cache" / "dense").glob("phi3*"))
