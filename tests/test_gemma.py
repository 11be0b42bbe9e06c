"""Gemma 2 and 3: what the norm behind each block, the caps and the two rotary bases change in every step of a cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from cusprun import arithmetic, sensitivity
from cusprun.anatomy import LayerWidths, describe
from cusprun.checkpoint import Weights, load_model
from cusprun.compact import compact
from cusprun.errors import InvalidRequest
from cusprun.importance.oracle import Unit, ablate
from cusprun.layerwise import LayerwiseModel
from cusprun.methods import score_layers
from cusprun.plan import LayerPlan, make_plan
from cusprun.refit import Form, refit
from cusprun.sensitivity import measure
from cusprun.statistics import collect, walk
from tests import pico
from tests.test_refit import divergence, repaired_and_sliced, twinned

IDS = np.random.default_rng(5).integers(3, 400, size=(14, 64))
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window_pattern": 2},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / request.param
    return pico.save_model(path, request.param, query_pre_attn_scalar=24, **MODELS[request.param])


def own_text(folder: Path) -> np.ndarray:
    """Two windows of the model's own text: on it a cut loses, and so losses have a sign to be counted in."""
    torch.manual_seed(0)
    start = torch.from_numpy(IDS[:2, :1])
    mask = torch.ones_like(start)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 63, "min_new_tokens": 63}
    found: np.ndarray = load_model(folder).generate(start, attention_mask=mask, **settings).numpy()
    return found


@torch.no_grad()
def test_one_layer_at_a_time_is_the_whole_model(folder: Path) -> None:
    anatomy, model, ids = describe(folder), load_model(folder), IDS[:3]
    wanted = model(torch.from_numpy(ids), output_hidden_states=True)
    layers = LayerwiseModel(folder, anatomy)
    torch.testing.assert_close(layers.embed(ids), wanted.hidden_states[0])
    for index, batches in walk(folder, anatomy, {"text": ids}, label="test", model=layers):
        (batch,) = batches
        if index + 1 < len(anatomy.layers):  # the last of transformers' states is behind the final norm
            torch.testing.assert_close(batch.out, wanted.hidden_states[index + 1].flatten(0, 1), atol=1e-4, rtol=1e-4)
    with layers.head() as head:
        torch.testing.assert_close(head(batch.out).unflatten(0, ids.shape), wanted.logits, atol=1e-4, rtol=1e-4)


def test_facts_that_an_export_asks_for(folder: Path) -> None:
    anatomy = describe(folder)
    three = anatomy.family.name == "gemma3_text"
    assert [layer.window for layer in anatomy.attention] == ([4096, None, 4096, None] if three else [4096, None, 4096])
    assert [layer.theta for layer in anatomy.attention] == ([10000.0, None] * 2 if three else [None] * 3)
    assert anatomy.attention_scale == pytest.approx(24**-0.5)
    assert (anatomy.attention_softcap, anatomy.output_softcap) == ((None, None) if three else (2.0, 8.0))
    assert anatomy.family.activation == "gelu_tanh"
    assert anatomy.parameters == sum(p.numel() for p in load_model(folder).parameters())
    assert dict(anatomy.tensor_shapes()) == {name: Weights(folder).shape(name) for name in Weights(folder)}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_scores_rank_units_as_their_removal_does(folder: Path, layer: int) -> None:
    """To first order: the closed form holds what the norm behind the block divides by to be what it was."""
    anatomy = describe(folder)
    units = [Unit("ffn", index) for index in range(0, 128, 2)]
    found = ablate(load_model(folder), IDS[:3], layer, units, loss=False)
    with pytest.raises(ValueError, match="whose layers attend alike"):
        ablate(load_model(folder), IDS[:3], layer, units)
    changes = np.array([each.layer_change for each in found])
    seen = collect(folder, anatomy, {"t": IDS[:3]})
    scores = score_layers(Weights(folder), anatomy, seen, "cus-prun", "mixture")[layer]
    closed = scores.ffn.change.numpy()[::2]
    assert spearmanr(changes, closed).statistic > 0.95
    assert np.median(closed / changes) == pytest.approx(1.0, abs=0.15)


def test_a_dropped_layer_costs_what_the_compacted_model_loses(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "EVERY", 1)
    monkeypatch.setattr(sensitivity, "DEAR", float("inf"))
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: False)
    anatomy, probes = describe(folder), own_text(folder)
    found = measure(folder, anatomy, {"t": IDS[:12]}, probes)
    whole = [LayerPlan(tuple(range(layer.ffn)), tuple(range(layer.kv_heads))) for layer in anatomy.layers]
    factors = []
    for index in range(1, len(whole)):
        kept = [LayerPlan((), ()) if place == index else layer for place, layer in enumerate(whole)]
        plan = make_plan(anatomy, tuple(kept))
        assert plan.expert.attention == anatomy.attention[:index] + anatomy.attention[index + 1 :]
        compact(folder, plan, tmp_path / str(index))
        loss = found[index].dropped
        assert loss is not None
        with torch.no_grad():
            dense, expert = (
                load_model(path)(torch.from_numpy(probes)).logits[:, :-1].log_softmax(-1)
                for path in (folder, tmp_path / str(index))
            )
        factors.append(loss / float((dense.exp() * (dense - expert)).sum(-1).mean()))
    assert factors[0] > 0
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-3)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_a_narrower_part_costs_what_the_refitted_model_loses(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Refit finds a ridge of its own, so the two agree roughly; without the norm they would not at all.

    Windows are too short for refit to add starts to them, which prices do not read.
    """
    monkeypatch.setattr(sensitivity, "EVERY", 1)
    windows = {"t": IDS[:12, :63]}
    anatomy, probes = describe(folder), own_text(folder)
    found = measure(folder, anatomy, windows, probes)
    factors = []
    for index, full in enumerate(anatomy.layers):
        losses = found[index].ffn if kind == "ffn" else found[index].kv_heads
        width = min(width for width in losses if width)
        cut = (
            LayerWidths(width, full.heads, full.kv_heads) if kind == "ffn" else LayerWidths(full.ffn, width * 2, width)
        )
        widths = [cut if place == index else layer for place, layer in enumerate(anatomy.layers)]
        plan = refit(folder, anatomy, widths, windows, tmp_path / f"{index}.refitted", form="parallel")
        compact(folder, plan, tmp_path / str(index), refitted=tmp_path / f"{index}.refitted")
        factors.append(losses[width] / divergence(folder, tmp_path / str(index), torch.from_numpy(probes)))
    assert 0 < max(factors) < 1.3 * min(factors)


@pytest.mark.parametrize("form", ["parallel", "sequential", "joint"])
def test_a_refitted_model_is_nearer_to_the_dense_one(tmp_path: Path, folder: Path, form: Form) -> None:
    import shutil

    dense = Path(shutil.copytree(folder, tmp_path / "dense"))
    twinned(dense)
    anatomy = describe(dense)
    full = anatomy.layers[0]
    widths = [LayerWidths(full.ffn * 5 // 8, full.heads, full.kv_heads) for _ in anatomy.layers]
    _, repaired, sliced = repaired_and_sliced(dense, widths, tmp_path, form)
    assert repaired < 0.5 * sliced


def test_no_layer_goes_without_attention(folder: Path) -> None:
    anatomy = describe(folder)
    whole = [LayerPlan(tuple(range(128)), (0, 1)) for _ in anatomy.layers]
    with pytest.raises(InvalidRequest, match=f"keeps attention, in {anatomy.family.name} every one"):
        make_plan(anatomy, (whole[0], LayerPlan(tuple(range(128)), ()), *whole[2:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'; the gated FFN of gemma2 uses gelu_pytorch_tanh"),
        ({"use_bidirectional_attention": True}, "attends in both directions"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 3"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"final_logit_softcapping": -1}, "final_logit_softcapping must be a number above 0"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import json

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "vocab_size": 64, **sizes, **change}))
    with pytest.raises(InvalidRequest, match=message):
        describe(tmp_path)
