"""Whole layers and whole attention blocks as units that go, and biases that the dense model lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cusprun.anatomy import Anatomy, LayerWidths, describe
from cusprun.checkpoint import Weights, load_model
from cusprun.compact import compact
from cusprun.errors import InvalidRequest
from cusprun.plan import LayerPlan, Plan, make_plan
from cusprun.statistics import collect, walk
from tests import pico

LAYERS = 5
IDS = torch.from_numpy(np.random.default_rng(4).integers(3, 400, size=(3, 40)))
WHOLE = LayerPlan(tuple(range(128)), (0, 1))
DROPPED = LayerPlan((), ())
WITHOUT_ATTENTION = LayerPlan(tuple(range(0, 128, 2)), ())
NARROW = LayerPlan(tuple(range(32, 128)), (1,))
# layer 1 goes whole, layers 2 and 4 lose their attention, layer 3 some units
MIXED = (WHOLE, DROPPED, WITHOUT_ATTENTION, NARROW, WITHOUT_ATTENTION)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "smollm3", "llama-biases"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, _, biases = request.param.partition("-")
    settings = {"attention_bias": True, "mlp_bias": True} if biases else {}
    folder = tmp_path_factory.mktemp("dense") / request.param
    return pico.save_model(folder, family, num_hidden_layers=LAYERS, **settings)


class Zero(nn.Module):
    """An attention block that adds nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


def masked(folder: Path, plan: Plan) -> Any:
    """The dense model with the same units out of action: layers skipped, attention silent, columns zero."""
    model = load_model(folder)
    model.config.use_cache = False
    stays = []
    for kept, before, layer in zip(plan.layers, plan.dense.layers, model.model.layers, strict=True):
        if kept.dropped:
            continue
        layer.mlp.down_proj.weight.data[:, sorted(set(range(before.ffn)) - set(kept.ffn))] = 0
        run = before.heads // before.kv_heads * plan.dense.head_dim
        for group in set(range(before.kv_heads)) - set(kept.kv_heads):
            layer.self_attn.o_proj.weight.data[:, group * run : (group + 1) * run] = 0
        if not kept.kv_heads:
            layer.self_attn = Zero()
        stays.append(layer)
    model.model.layers = nn.ModuleList(stays)
    model.config.num_hidden_layers = len(stays)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits
    return found


def test_compacted_equals_the_dense_model_without_those_blocks(tmp_path: Path, dense: Path) -> None:
    plan = make_plan(describe(dense), MIXED)
    compact(dense, plan, tmp_path / "expert")
    expert = load_model(tmp_path / "expert")
    torch.testing.assert_close(logits(expert), logits(masked(dense, plan)), atol=1e-4, rtol=0)
    assert describe(tmp_path / "expert") == plan.expert
    assert plan.expert.parameters == sum(p.numel() for p in expert.parameters())
    assert dict(plan.expert.tensor_shapes()) == {n: tuple(p.shape) for n, p in expert.named_parameters()}
    assert not any(".1.self_attn" in name or ".1.input_layernorm" in name for name in Weights(tmp_path / "expert"))


def test_generation_with_the_cache_equals_generation_without(tmp_path: Path, dense: Path) -> None:
    compact(dense, make_plan(describe(dense), MIXED), tmp_path / "expert")
    expert = load_model(tmp_path / "expert")
    prompt = IDS[:, :12]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings["attention_mask"] = torch.ones_like(prompt)
    cached = expert.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, expert.generate(prompt, use_cache=False, **settings))
    assert cached.shape[1] == 24
    beams = expert.generate(prompt, use_cache=True, num_beams=3, **settings)  # reorders the cache
    assert torch.equal(beams, expert.generate(prompt, use_cache=False, num_beams=3, **settings))


def test_the_runtime_reuses_a_cache_with_empty_places(tmp_path: Path, dense: Path) -> None:
    from cusprun.runtimes.torch_runtime import TorchRuntime

    compact(dense, make_plan(describe(dense), MIXED), tmp_path / "expert")
    runtime = TorchRuntime(tmp_path / "expert", threads=1)
    first, second = IDS[0].tolist(), IDS[0, :20].tolist() + IDS[1, :5].tolist()
    runtime.prefill(first)
    reused = runtime.prefill(second, reuse=True)  # crops the cache
    np.testing.assert_allclose(
        reused, logits(load_model(tmp_path / "expert"), torch.tensor([second]))[0, -1], atol=1e-4
    )


def test_saving_and_loading_again(tmp_path: Path, dense: Path) -> None:
    compact(dense, make_plan(describe(dense), MIXED), tmp_path / "expert")
    expert = load_model(tmp_path / "expert")
    expert.save_pretrained(tmp_path / "again")
    assert describe(tmp_path / "again") == describe(tmp_path / "expert")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(expert))


def test_an_expert_is_cut_once_more(tmp_path: Path, dense: Path) -> None:
    """Layers without attention may be layers of the dense model of the next build."""
    compact(dense, make_plan(describe(dense), MIXED), tmp_path / "first")
    anatomy = describe(tmp_path / "first")
    layers = tuple(LayerPlan(tuple(range(32)), tuple(range(layer.kv_heads))) for layer in anatomy.layers)
    plan = make_plan(anatomy, (*layers[:2], DROPPED, layers[3]))
    compact(tmp_path / "first", plan, tmp_path / "second")
    assert [layer.heads for layer in describe(tmp_path / "second").layers] == [4, 0, 0]
    assert Weights(tmp_path / "second").shape("model.layers.2.mlp.up_proj.weight") == (32, 64)
    logits(load_model(tmp_path / "second"))


def test_the_walk_goes_through_layers_without_attention(tmp_path: Path, dense: Path) -> None:
    compact(dense, make_plan(describe(dense), MIXED), tmp_path / "expert")
    anatomy = describe(tmp_path / "expert")
    model = load_model(tmp_path / "expert")
    with torch.no_grad():
        wanted = model(IDS, output_hidden_states=True).hidden_states
    assert len(wanted) == len(anatomy.layers) + 1
    for index, batches in walk(tmp_path / "expert", anatomy, {"text": IDS.numpy()}, label="test"):
        (batch,) = batches
        assert batch.heads.shape == (IDS.numel(), anatomy.layers[index].heads * anatomy.head_dim)
        if index + 1 < len(anatomy.layers):  # the last of transformers' states is behind the final norm
            torch.testing.assert_close(batch.out, wanted[index + 1].flatten(0, 1), atol=1e-4, rtol=1e-4)
    found = collect(tmp_path / "expert", anatomy, {"text": IDS.numpy()})
    assert [len(layer["text"].attention.second) for layer in found] == [layer.kv_heads for layer in anatomy.layers]


def test_whole_layers_alone_leave_a_stock_model(tmp_path: Path, dense: Path) -> None:
    plan = make_plan(describe(dense), (DROPPED, WHOLE, DROPPED, WHOLE, WHOLE))
    compact(dense, plan, tmp_path / "expert")
    config = json.loads((tmp_path / "expert" / "config.json").read_text())
    assert config["model_type"] == plan.dense.family.name
    assert (config["num_hidden_layers"], "layer_intermediate_sizes" in config) == (3, False)
    expert = load_model(tmp_path / "expert")
    assert type(expert).__name__ == plan.dense.family.model_class
    torch.testing.assert_close(logits(expert), logits(masked(dense, plan)), atol=1e-4, rtol=0)


def test_plans_survive_json_and_count_every_dense_layer(dense: Path) -> None:
    anatomy = describe(dense)
    plan = make_plan(anatomy, MIXED, attention_bias=True)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), anatomy) == plan
    assert plan.expert.attention_bias
    assert plan.sources == (0, 2, 3, 4)
    assert [row["layer"] for row in plan.counts()] == list(range(LAYERS))
    assert [(row["ffn_expert"], row["heads_expert"], row["kv_heads_expert"]) for row in plan.counts()] == [
        (128, 4, 2), (0, 0, 0), (64, 0, 0), (96, 2, 1), (64, 0, 0),
    ]  # fmt: skip


def test_blocks_cost_what_goes_with_them(dense: Path) -> None:
    anatomy = describe(dense)
    tensors = {name: int(np.prod(shape)) for name, shape in anatomy.tensor_shapes()}
    layer = {
        name.removeprefix("model.layers.2."): n for name, n in tensors.items() if name.startswith("model.layers.2")
    }
    attention = sum(n for name, n in layer.items() if name.startswith(("self_attn", "input_layernorm")))
    without = anatomy.with_layers((*anatomy.layers[:2], LayerWidths(128, 0, 0), *anatomy.layers[3:]))
    assert anatomy.parameters - without.parameters == attention == anatomy.attention_parameters(anatomy.layers[2])
    shorter = anatomy.with_layers((*anatomy.layers[:2], None, *anatomy.layers[3:]))
    assert anatomy.parameters - shorter.parameters == sum(layer.values()) == anatomy.layer_parameters(anatomy.layers[2])
    matrices = sum(n for name, n in layer.items() if name.startswith("self_attn") and name.endswith("proj.weight"))
    assert anatomy.macs_per_token - without.macs_per_token == matrices


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((WITHOUT_ATTENTION, *[WHOLE] * 4), "layer 0 with 64 channels and 0 kv heads"),
        ((DROPPED, WITHOUT_ATTENTION, *[WHOLE] * 3), "layer 1 with 64 channels and 0 kv heads"),
        ((WHOLE, LayerPlan((), (0, 1)), *[WHOLE] * 3), "layer 1 with 0 channels and 2 kv heads"),
        ((WHOLE, LayerPlan((1, 2), (0, 1)), *[WHOLE] * 3), "layer 1 with 2 channels"),
        ((DROPPED,) * 5, "leaves no layer"),
    ],
)
def test_plans_that_no_runtime_computes(dense: Path, layers: tuple[LayerPlan, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_plan(describe(dense), layers)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_num_attention_heads": [0, 4, 4], "layer_num_key_value_heads": [0, 2, 2]},
        {"layer_num_attention_heads": [4, 4, 4], "layer_num_key_value_heads": [2, 0, 2]},
        {"layer_num_attention_heads": [4, 0, 4], "layer_num_key_value_heads": [2, 2, 2]},
        {"layer_intermediate_sizes": [128, 0, 128]},
    ],
)
def test_configs_of_such_layers_that_cannot_be(tmp_path: Path, change: dict[str, list[int]]) -> None:
    from huggingface_hub.errors import StrictDataclassClassValidationError

    from cusprun.anatomy.llama_per_layer import CusprunLlamaForCausalLM, PerLayerConfig
    from tests.exporters.models import PER_LAYER

    sizes = {"vocab_size": 64, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {**sizes, **PER_LAYER, "layer_num_attention_heads": [4] * 3, "layer_num_key_value_heads": [2] * 3}
    CusprunLlamaForCausalLM(PerLayerConfig(**config))
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="cannot have"):
        CusprunLlamaForCausalLM(PerLayerConfig(**{**config, **change}))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change, "model_type": "cusprun_llama"}))
    with pytest.raises(InvalidRequest, match="query heads on"):
        describe(tmp_path)


def write_biases(folder: Path, anatomy: Anatomy, layers: list[int], seed: int = 5) -> dict[str, torch.Tensor]:
    """What a method that compensates by biases leaves: o_proj and down_proj biases under the dense names."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"{anatomy.prefix(layer)}{place}.bias": torch.randn(anatomy.hidden_size, generator=generator)
        for layer in layers
        for place in ("self_attn.o_proj", "mlp.down_proj")
    }
    folder.mkdir()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return found


def test_biases_that_the_dense_model_lacks(tmp_path: Path, dense: Path) -> None:
    anatomy = describe(dense)
    plan = make_plan(anatomy, (WHOLE, DROPPED, NARROW, NARROW, WHOLE), attention_bias=True, mlp_bias=True)
    biases = write_biases(tmp_path / "refitted", anatomy, [0, 2, 3])
    compact(dense, plan, tmp_path / "expert", refitted=tmp_path / "refitted")
    expert = load_model(tmp_path / "expert")
    reference = masked(dense, plan)
    for index, source in enumerate(plan.sources):
        for place, module in (("self_attn.o_proj", "self_attn"), ("mlp.down_proj", "mlp")):
            name = f"{anatomy.prefix(source)}{place}.bias"
            if name in biases:
                linear = reference.model.layers[index].get_submodule(place)
                linear.bias = nn.Parameter(biases[name])
            elif not anatomy.attention_bias:
                assert not expert.model.layers[index].get_submodule(place).bias.any()
            assert expert.model.layers[index].get_submodule(module)
    torch.testing.assert_close(logits(expert), logits(reference), atol=1e-4, rtol=0)
    assert plan.expert.parameters == sum(p.numel() for p in expert.parameters())
    assert describe(tmp_path / "expert") == plan.expert


def test_biases_keep_a_uniform_llama_stock_and_not_a_mistral(tmp_path: Path, dense: Path) -> None:
    anatomy = describe(dense)
    plan = make_plan(anatomy, (NARROW,) * LAYERS, attention_bias=True, mlp_bias=True)
    write_biases(tmp_path / "refitted", anatomy, list(range(LAYERS)))
    compact(dense, plan, tmp_path / "expert", refitted=tmp_path / "refitted")
    kind = type(load_model(tmp_path / "expert")).__name__
    stock = anatomy.family.model_class
    assert kind == (stock if anatomy.family.name in ("llama", "smollm3") else f"Cusprun{stock}")
