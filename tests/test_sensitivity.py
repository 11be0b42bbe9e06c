"""Measured losses against cutting the model for real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun import arithmetic, sensitivity
from cusprun.anatomy import LayerWidths, describe
from cusprun.checkpoint import load_model
from cusprun.compact import compact
from cusprun.plan import LayerPlan, make_plan
from cusprun.sensitivity import _Effect, _exchange, ffn_levels, head_levels, measure
from tests import pico

IDS = np.random.default_rng(5).integers(3, 400, size=(14, 64))
PROBES = IDS[12:]


def test_levels() -> None:
    assert ffn_levels(LayerWidths(1536, 9, 3), deep=False) == [1075, 614]
    assert ffn_levels(LayerWidths(1536, 9, 3), deep=True) == [1075, 614, 307, 32]
    assert ffn_levels(LayerWidths(32, 4, 2), deep=True) == []
    assert head_levels(LayerWidths(1536, 9, 3)) == [2, 1]
    assert head_levels(LayerWidths(5632, 32, 8)) == [6, 4, 2]
    assert head_levels(LayerWidths(64, 4, 1)) == []


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}])
def test_a_dropped_layer_and_lost_attention_cost_what_the_compacted_model_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """Where nothing is refitted the variant is the real model's: divergences, up to one common factor, agree."""
    monkeypatch.setattr(sensitivity, "EVERY", 1)
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: False)
    folder = pico.save_model(tmp_path / "dense", **settings)
    anatomy = describe(folder)
    monkeypatch.setattr(
        sensitivity, "DEAR", float("inf")
    )  # a random model's attention is dear; measure it all the same
    found = measure(folder, anatomy, {"t": IDS[:12]}, PROBES)
    whole = [LayerPlan(tuple(range(layer.ffn)), tuple(range(layer.kv_heads))) for layer in anatomy.layers]
    factors = []
    for index in (1, 2):
        for kept, loss in (
            (LayerPlan((), ()), found[index].dropped),
            (LayerPlan(whole[index].ffn, ()), found[index].kv_heads[0]),
        ):
            plan = make_plan(anatomy, tuple(kept if place == index else layer for place, layer in enumerate(whole)))
            out = tmp_path / f"{index}-{len(kept.ffn)}"
            compact(folder, plan, out)
            with torch.no_grad():
                dense, expert = (
                    load_model(path)(torch.from_numpy(PROBES)).logits[:, :-1].log_softmax(-1) for path in (folder, out)
                )
            assert loss is not None
            factors.append(loss / float((dense.exp() * (dense - expert)).sum(-1).mean()))
    assert factors[0] > 0
    assert factors == pytest.approx([factors[0]] * 4, rel=1e-3)


def test_more_gone_costs_more_and_the_first_layer_keeps_attention(pico_model: Path) -> None:
    found = measure(pico_model, describe(pico_model), {"t": IDS[:12]}, PROBES)
    assert found[0].dropped is None
    assert 0 not in found[0].kv_heads
    for layer in found:
        losses = list(layer.ffn.values())
        assert losses[0] <= losses[-1]
        assert min(losses) > 0


def test_text_that_cutting_makes_likelier_still_tells_cuts_apart(pico_model: Path) -> None:
    cheap, dear = _Effect(0.1, -0.2), _Effect(0.4, -0.1)
    assert _exchange([cheap, dear]) == 1
    assert _exchange([_Effect(0.1, 0.3), dear]) == pytest.approx(0.2 / 0.5)
    assert _exchange([_Effect(0.0, 0.0)]) == 1


def test_layers_that_are_as_narrow_as_may_be_are_left_alone(tmp_path: Path) -> None:
    folder = pico.save_model(tmp_path / "m", intermediate_size=32, num_key_value_heads=1)
    found = measure(folder, describe(folder), {"t": IDS[:12]}, PROBES)
    assert all(not layer.ffn for layer in found)
