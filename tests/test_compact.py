"""The central test: a compacted model answers as the dense one with the same units masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.allocation import Layout, plan_ratio
from cusprun.anatomy import describe
from cusprun.checkpoint import Weights, load_model
from cusprun.compact import compact, unit_indices
from cusprun.methods import score_layers
from cusprun.plan import Plan
from cusprun.statistics import collect
from tests import pico

IDS = np.random.default_rng(2).integers(3, 400, size=(4, 48))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa-tied": ("llama", {}),
    "gqa-untied": ("llama", {"tie_word_embeddings": False}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mha-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "biases-mha-untied": ("llama", {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False, "head_dim": 24}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "head_dim": 24}),
    "wide-heads": ("llama", {"head_dim": 32}),
}


def plan_of(folder: Path, layout: Layout, ratio: float) -> Plan:
    anatomy = describe(folder)
    statistics = collect(folder, anatomy, {"language": IDS[:2], "task": IDS[2:]})
    scores = score_layers(Weights(folder), anatomy, statistics, "cus-prun", "intersection")
    return plan_ratio(anatomy, scores, ratio, align=8, layout=layout)


def masked(folder: Path, plan: Plan) -> Any:
    """The dense model with the columns that read removed units set to zero."""
    model = load_model(folder)
    for index, (kept, layer) in enumerate(zip(plan.layers, model.model.layers, strict=True)):
        before = plan.dense.layers[index]
        columns = torch.ones(before.ffn, dtype=torch.bool)
        columns[list(kept.ffn)] = False
        layer.mlp.down_proj.weight.data[:, columns] = 0
        heads = torch.ones(before.heads * plan.dense.head_dim, dtype=torch.bool)
        heads[unit_indices(kept, "heads", before.heads // before.kv_heads, plan.dense.head_dim)] = False
        layer.self_attn.o_proj.weight.data[:, heads] = 0
    return model


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_compacted_equals_masked(tmp_path: Path, kind: str, layout: Layout) -> None:
    family, settings = KINDS[kind]
    folder = pico.save_model(tmp_path / "dense", family, **settings)
    plan = plan_of(folder, layout, 0.3)
    assert plan.removed_share > 0.2
    compact(folder, plan, tmp_path / "expert")
    expert = load_model(tmp_path / "expert")
    assert sum(p.numel() for p in expert.parameters()) == plan.expert.parameters < plan.dense.parameters
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        difference = (masked(folder, plan)(ids).logits - expert(ids).logits).abs().max()
        changed = (load_model(folder)(ids).logits - expert(ids).logits).abs().max()
    assert difference <= 1e-4
    assert changed > 1e-2  # the cut is no empty one
    assert describe(tmp_path / "expert") == plan.expert
    assert all(
        (tensor != 0).any(0).all()
        for name, tensor in load_file(tmp_path / "expert" / "model.safetensors").items()
        if name.endswith("down_proj.weight")
    )


def test_uniform_layouts_load_without_cusprun(tmp_path: Path, pico_model: Path) -> None:
    import subprocess
    import sys

    compact(pico_model, plan_of(pico_model, "uniform", 0.3), tmp_path / "expert")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(tmp_path / 'expert')!r}); "
        "assert not any(name.split('.')[0] == 'cusprun' for name in sys.modules); print(type(m).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LlamaForCausalLM"


def test_element_types_and_companions_are_kept(tmp_path: Path, pico_model: Path) -> None:
    import shutil

    folder = tmp_path / "half"
    shutil.copytree(pico_model, folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compact(folder, plan_of(folder, "per-layer", 0.3), tmp_path / "expert")
    assert {Weights(tmp_path / "expert").dtype(name) for name in Weights(tmp_path / "expert")} == {"BF16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "expert" / name).read_bytes() == (folder / name).read_bytes()


def test_a_failing_tensor_leaves_nothing(tmp_path: Path, pico_model: Path) -> None:
    import shutil

    from cusprun.errors import Failed

    plan = plan_of(pico_model, "per-layer", 0.3)
    folder = tmp_path / "nan"
    shutil.copytree(pico_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        compact(folder, plan, tmp_path / "expert")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan"]


def test_an_expert_is_another_model_than_the_dense_one(tmp_path: Path, pico_model: Path) -> None:
    """It may be the input of a build itself: what was known of the dense weights' file is not passed on."""
    import json
    import shutil

    from cusprun.dense import find_dense

    folder = tmp_path / "from-gguf"
    shutil.copytree(pico_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["cusprun"] = {"source_sha256": "0" * 64, "source_bytes": 5, "tokenizer_pre": "gpt-2", "licence": "mit"}
    (folder / "config.json").write_text(json.dumps(config))
    compact(folder, plan_of(folder, "per-layer", 0.3), tmp_path / "expert")
    dense, expert = find_dense(str(folder)), find_dense(str(tmp_path / "expert"))
    assert dense.sha256 == "0" * 64
    assert expert.sha256 not in (dense.sha256, dense.key)
    assert expert.licence == "mit"
    assert len({dense.key, expert.key, find_dense(str(pico_model)).key}) == 3  # the same weights, another config
