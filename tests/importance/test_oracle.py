"""The oracle against the model with a unit's columns cut to zero, and Cus-Prun's closed form against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.importance import LayerMatrices, find_criterion
from cusprun.importance.oracle import Unit, ablate, sample_units
from cusprun.statistics import collect
from tests import pico

IDS = np.random.default_rng(5).integers(3, 400, size=(3, 40))


def all_units(model: Any) -> list[Unit]:
    config = model.config
    return sample_units(config.intermediate_size, config.num_key_value_heads, 10**6)


def closed_form(folder: Path, windows: np.ndarray, layer: int, model: Any, units: list[Unit]) -> list[float]:
    anatomy, block = describe(folder), model.model.layers[layer]
    seen = collect(folder, anatomy, {"text": windows})[layer]["text"]
    matrices = LayerMatrices(block.mlp.down_proj.weight.detach(), block.self_attn.o_proj.weight.detach())
    scores = find_criterion("cus-prun").score(seen, matrices)
    return [float((scores.ffn if unit.kind == "ffn" else scores.attention)[unit.index]) for unit in units]


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}])
def test_losses_are_those_of_the_model_without_the_unit(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = load_model(pico.save_model(tmp_path / "m", **settings))
    units = [Unit("ffn", 0), Unit("ffn", 77), Unit("attention", 1)]
    ids = torch.from_numpy(IDS)

    def loss() -> float:
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    before = loss()
    for found in ablate(model, IDS, 1, units):
        block, index = model.model.layers[1], found.unit.index
        weight = (block.mlp.down_proj if found.unit.kind == "ffn" else block.self_attn.o_proj).weight.data
        columns = slice(index, index + 1) if found.unit.kind == "ffn" else slice(index * 32, index * 32 + 32)
        kept = weight[:, columns].clone()
        weight[:, columns] = 0
        assert found.loss_change == pytest.approx(loss() - before, abs=2e-6)
        weight[:, columns] = kept
    assert loss() == before  # everything is back where it was


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_closed_form_is_the_change_that_ablation_makes(pico_model: Path, layer: int) -> None:
    model = load_model(pico_model)
    units = all_units(model)
    found = ablate(model, IDS, layer, units, loss=False)
    expected = closed_form(pico_model, IDS, layer, model, units)
    np.testing.assert_allclose([ablation.block_change for ablation in found], expected, rtol=2e-3)
    assert spearmanr(expected, [ablation.layer_change for ablation in found]).statistic >= 0.9
    assert all(ablation.loss_change is None for ablation in found)


def test_the_layer_hears_of_a_head_twice(pico_model: Path) -> None:
    """The FFN answers what attention lost; a channel's own change is the layer's."""
    model = load_model(pico_model)
    channel, head = ablate(model, IDS, 1, [Unit("ffn", 3), Unit("attention", 0)], loss=False)
    assert channel.layer_change == pytest.approx(channel.block_change, rel=1e-3)
    assert head.layer_change > 1.01 * head.block_change


def test_units_are_drawn_once_each() -> None:
    units = sample_units(1536, 3, 24, seed=1)
    assert len(set(units)) == 24
    assert [unit for unit in units if unit.kind == "attention"] == [Unit("attention", group) for group in range(3)]
    assert units == sample_units(1536, 3, 24, seed=1) != sample_units(1536, 3, 24, seed=2)
    assert len(sample_units(8, 2, 100)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("layer", [2, 14, 27])
def test_closed_form_ranks_as_the_oracle_on_smollm2(layer: int) -> None:
    from cusprun.checkpoint import load_tokenizer
    from cusprun.dense import find_dense

    dense = find_dense("smollm2-135m-instruct")
    text = (Path(__file__).parent.parent / "data" / "contract.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(dense.folder)(text, add_special_tokens=False)["input_ids"]
    windows = np.array(ids[: len(ids) // 128 * 128], dtype=np.int64).reshape(-1, 128)[:4]
    model = load_model(dense.folder)
    units = sample_units(1536, 3, 64)
    found = ablate(model, windows, layer, units, loss=False)
    expected = closed_form(dense.folder, windows, layer, model, units)
    assert spearmanr(expected, [ablation.block_change for ablation in found]).statistic >= 0.99
    channels = [place for place, unit in enumerate(units) if unit.kind == "ffn"]
    changes = [found[place].layer_change for place in channels]
    assert spearmanr([expected[place] for place in channels], changes).statistic >= 0.9
