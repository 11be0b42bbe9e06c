"""Model folders: stock and per-layer forms, lazy weights, damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.anatomy import LayerWidths, describe, read_config
from cusprun.checkpoint import Weights, expert_config, is_stock, load_model, write_weights
from cusprun.errors import Failed, InvalidRequest
from tests import pico

WIDTHS = (LayerWidths(96, 4, 2), LayerWidths(64, 2, 1), LayerWidths(33, 4, 2))


def random_per_layer(folder: Path, family: str) -> Path:
    """A per-layer model with random weights."""
    dense = pico.save_model(folder / "dense", family)
    anatomy = describe(dense).with_layers(WIDTHS)
    out = folder / "per-layer"
    shutil.copytree(dense, out)
    (out / "config.json").write_text(json.dumps(expert_config(read_config(dense), anatomy)))
    torch.manual_seed(1)
    save_file(
        {name: torch.randn(shape) * 0.1 for name, shape in anatomy.tensor_shapes()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "smollm3", "gemma2", "gemma3_text"])
def test_per_layer_models_load_generate_and_save(tmp_path: Path, family: str) -> None:
    folder = random_per_layer(tmp_path, family)
    model = load_model(folder)
    assert [layer.mlp.gate_proj.out_features for layer in model.model.layers] == [96, 64, 33]
    assert sum(p.numel() for p in model.parameters()) == describe(folder).parameters
    ids = torch.arange(1, 13).unsqueeze(0)
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    # the same continuation without a cache: one full forward a token
    plain = ids
    for _ in range(answer.shape[1] - ids.shape[1]):
        plain = torch.cat([plain, model(plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(answer, plain)
    model.save_pretrained(tmp_path / "again")
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "again" / "tokenizer.json")
    assert torch.equal(load_model(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "first",
    ["import transformers, cusprun", "import cusprun", "from transformers import AutoConfig; import cusprun",
     "from transformers import AutoModelForCausalLM; import cusprun",
     "import cusprun; import transformers.models.llama.modeling_llama",
     "import cusprun; import transformers.models.mistral.modeling_mistral",
     "import cusprun.anatomy.sliced_model", "import cusprun.anatomy.llama_per_layer",
     "import cusprun.anatomy.mistral_per_layer", "import cusprun; import transformers.models.qwen3.modeling_qwen3",
     "import cusprun.anatomy.qwen3_per_layer", "import cusprun.anatomy.smollm3_per_layer",
     "import cusprun.anatomy.gemma2_per_layer", "import cusprun.anatomy.gemma3_per_layer",
     "import cusprun; import transformers.models.gemma3.modeling_gemma3"],
)  # fmt: skip
def test_importing_cusprun_registers_in_any_order(tmp_path: Path, first: str) -> None:
    folder = random_per_layer(tmp_path, "llama")
    load = f"print(type(A.from_pretrained({str(folder)!r})).__name__)"
    code = f"{first}\nfrom transformers import AutoModelForCausalLM as A\n{load}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CusprunLlamaForCausalLM"


def test_without_cusprun_the_message_names_it(tmp_path: Path) -> None:
    folder = random_per_layer(tmp_path, "llama")
    code = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "cusprun_llama" in done.stderr


def test_importing_cusprun_imports_no_heavy_package() -> None:
    code = "import sys, cusprun.cli; print([m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_anatomy_counts_what_transformers_counts(tmp_path: Path) -> None:
    for number, settings in enumerate(
        [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}]
    ):
        folder = pico.save_model(tmp_path / str(number), "llama", **settings)
        anatomy = describe(folder)
        model = load_model(folder)
        assert anatomy.parameters == sum(p.numel() for p in model.parameters())
        assert dict(anatomy.tensor_shapes()) == {name: Weights(folder).shape(name) for name in Weights(folder)}


def test_stock_llama_refuses_head_counts_that_do_not_divide_the_hidden_size(tmp_path: Path) -> None:
    anatomy = describe(pico.save_model(tmp_path / "m", num_attention_heads=8, num_key_value_heads=4, head_dim=8))
    three_groups = anatomy.with_layers((LayerWidths(64, 6, 3),) * 3)
    assert three_groups.uniform
    assert not is_stock(three_groups)
    assert is_stock(anatomy.with_layers((LayerWidths(64, 4, 2),) * 3))


def test_shards_hold_no_more_than_asked_and_load(tmp_path: Path, pico_model: Path) -> None:
    tensors = load_file(pico_model / "model.safetensors")
    sizes = {name: tensor.numel() * 4 for name, tensor in tensors.items()}
    shutil.copytree(pico_model, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    write_weights(tmp_path / "sharded", tensors.items(), sizes, shard_bytes=100_000)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(load_model(tmp_path / "sharded")(ids).logits, load_model(pico_model)(ids).logits)
    assert sorted(Weights(tmp_path / "sharded")) == sorted(tensors)


def damaged(folder: Path, pico_model: Path) -> Path:
    shutil.copytree(pico_model, folder)
    return folder


def test_truncated_safetensors(tmp_path: Path, pico_model: Path) -> None:
    folder = damaged(tmp_path / "m", pico_model)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InvalidRequest, match="not a whole safetensors file"):
        Weights(folder)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, pico_model: Path) -> None:
    folder = damaged(tmp_path / "m", pico_model)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 64)
    tensors["extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequest) as caught:
        Weights(folder).check(describe(folder))
    for expected in ("model.norm.weight is missing", "up_proj.weight is [5, 64]", "extra.weight is not part"):
        assert expected in str(caught.value)


def test_values_that_are_not_finite_are_named(tmp_path: Path, pico_model: Path) -> None:
    folder = damaged(tmp_path / "m", pico_model)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match=r"model\.layers\.2\.self_attn\.v_proj\.weight holds NaN"):
        Weights(folder)["model.layers.2.self_attn.v_proj.weight"]


def test_pickled_weights_are_not_read(tmp_path: Path, pico_model: Path) -> None:
    folder = damaged(tmp_path / "m", pico_model)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match="pickle"):
        Weights(folder)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, pico_model: Path) -> None:
    folder = damaged(tmp_path / "m", pico_model)
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidRequest, match="outside its folder"):
        Weights(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "bert"}, "supported families: llama, mistral"), ({"hidden_size": "big"}, "hidden_size must be"),
     ({"num_key_value_heads": 3}, "4 query heads on 3 kv heads"), ({"hidden_act": "relu"}, "uses silu")],
)  # fmt: skip
def test_configs_that_cannot_be(tmp_path: Path, pico_model: Path, change: dict[str, object], message: str) -> None:
    folder = damaged(tmp_path / "m", pico_model)
    config = read_config(folder) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match=message):
        describe(folder)
