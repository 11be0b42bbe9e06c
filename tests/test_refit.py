"""Refit of a whole model: nearer to the dense one than slices alone, in every form and combination."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun import joint, part
from cusprun.anatomy import LayerWidths, describe
from cusprun.checkpoint import load_model
from cusprun.compact import compact
from cusprun.errors import InvalidRequest
from cusprun.plan import Plan
from cusprun.refit import Form, refit
from cusprun.surgeon import choose_columns
from tests import pico


def twinned(folder: Path) -> None:
    """Every channel gets a twin, as trained models have neighbours: refitting finds what the twins can take over."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            half = len(tensor) // 2
            tensor[half:] = tensor[:half]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def divergence(folder: Path, expert: Path, ids: torch.Tensor) -> float:
    with torch.no_grad():
        dense, other = (load_model(path)(ids).logits.log_softmax(-1) for path in (folder, expert))
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


IDS = np.random.default_rng(4).integers(3, 400, size=(28, 64))
SEEN, UNSEEN = IDS[:24], torch.from_numpy(IDS[24:])


def repaired_and_sliced(folder: Path, widths: list[LayerWidths], out: Path, form: Form) -> tuple[Plan, float, float]:
    """The plan of a refit below ``out``, and how far from the dense model refitted and bare slices are on new text."""
    plan = refit(folder, describe(folder), widths, {"t": SEEN}, out / "refitted", form=form)
    compact(folder, plan, out / "sliced")
    compact(folder, plan, out / "expert", refitted=out / "refitted")
    repaired, sliced = (divergence(folder, out / name, UNSEEN) for name in ("expert", "sliced"))
    return plan, repaired, sliced


@pytest.mark.parametrize("form", ["parallel", "sequential", "joint"])
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}])
def test_a_refitted_model_is_nearer_to_the_dense_one(tmp_path: Path, settings: dict[str, object], form: Form) -> None:
    folder = pico.save_model(tmp_path / "dense", **settings)
    twinned(folder)
    anatomy = describe(folder)
    full = anatomy.layers[0]
    widths = [LayerWidths(full.ffn * 5 // 8, full.heads, full.kv_heads) for _ in anatomy.layers]
    plan, repaired, sliced = repaired_and_sliced(folder, widths, tmp_path, form)
    assert plan.expert.layers == tuple(widths)
    assert repaired < 0.5 * sliced
    moved = {name for name in load_weights(tmp_path / "refitted") if "gate_proj" in name or "up_proj" in name}
    assert len(moved) == (2 * len(anatomy.layers) if form == "joint" else 0)


@pytest.mark.parametrize("form", ["parallel", "sequential", "joint"])
@pytest.mark.parametrize("combine", ["mixture", "intersection", "max"])
def test_layers_and_attention_blocks_may_go_in_every_combination(tmp_path: Path, form: Form, combine: str) -> None:
    folder = pico.save_model(tmp_path / "dense")
    anatomy = describe(folder)
    full = anatomy.layers[0]
    widths = [LayerWidths(full.ffn // 2, full.heads // 2, full.kv_heads // 2), None, LayerWidths(full.ffn, 0, 0)]
    windows = {"one": SEEN[:12], "two": SEEN[12:]}
    plan = refit(folder, anatomy, widths, windows, tmp_path / "refitted", form=form, combine=combine)  # type: ignore[arg-type]
    assert plan.layers[1].dropped
    assert not plan.layers[2].kv_heads
    compact(folder, plan, tmp_path / "expert", refitted=tmp_path / "refitted")
    with torch.no_grad():
        assert torch.isfinite(load_model(tmp_path / "expert")(UNSEEN).logits).all()


def test_the_sequential_form_repairs_what_the_layers_before_broke(tmp_path: Path) -> None:
    """On text that gave no moments too: a layer puts back what the layers before it lost."""
    folder = pico.save_model(tmp_path / "dense")
    anatomy = describe(folder)
    full = anatomy.layers[0]
    widths = [LayerWidths(full.ffn // 2, full.heads, full.kv_heads)] * len(anatomy.layers)
    found = {}
    for form in ("parallel", "sequential"):
        plan = refit(folder, anatomy, widths, {"t": SEEN}, tmp_path / f"{form}.refitted", form=form)  # type: ignore[arg-type]
        compact(folder, plan, tmp_path / form, refitted=tmp_path / f"{form}.refitted")
        found[form] = [divergence(folder, tmp_path / form, ids) for ids in (torch.from_numpy(SEEN), UNSEEN)]
    assert all(one < other for one, other in zip(found["sequential"], found["parallel"], strict=True))


@pytest.mark.parametrize("form", ["parallel", "sequential", "joint"])
def test_heads_that_go_are_made_up_for(tmp_path: Path, form: Form) -> None:
    """Half of the kv groups are near copies of the others: o_proj of what stays takes their part over."""
    folder = pico.save_model(tmp_path / "dense")
    tensors, chance = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if any(matrix in name for matrix in ("q_proj", "k_proj", "v_proj")):
            half = len(tensor) // 2
            tensor[half:] = tensor[:half] * (1 + 0.05 * torch.randn(tensor[:half].shape, generator=chance))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    anatomy = describe(folder)
    full = anatomy.layers[0]
    widths = [LayerWidths(full.ffn, full.heads // 2, full.kv_heads // 2)] * len(anatomy.layers)
    _, repaired, sliced = repaired_and_sliced(folder, widths, tmp_path, form)
    assert repaired < 0.2 * sliced


def test_each_way_to_combine_has_its_own_say(tmp_path: Path) -> None:
    """Two texts that share no token: pooled, or each with a veto, or each with a wish, other channels stay."""
    folder = pico.save_model(tmp_path / "dense")
    anatomy = describe(folder)
    widths = [LayerWidths(layer.ffn // 2, layer.heads, layer.kv_heads) for layer in anatomy.layers]
    low, high = (np.random.default_rng(seed).integers(3 + 200 * seed, 200 + 200 * seed, (24, 64)) for seed in (0, 1))
    windows = {"one": low, "two": high[:6]}
    plans = {
        combine: refit(folder, anatomy, widths, windows, tmp_path / combine, combine=combine).layers  # type: ignore[arg-type]
        for combine in ("mixture", "intersection", "max")
    }
    assert len(set(plans.values())) == 3
    moments = {name: first_moments(folder, ids) for name, ids in windows.items()}
    down = load_model(folder).model.layers[0].mlp.down_proj.weight.detach().double()
    for combine, agreement in (("intersection", "intersection"), ("max", "max")):
        chosen = choose_columns(down, list(moments.values()), [widths[0].ffn], agreement)[0]  # type: ignore[arg-type]
        assert len(set(chosen) & set(plans[combine][0].ffn)) >= 0.9 * len(chosen)


def first_moments(folder: Path, ids: np.ndarray) -> torch.Tensor:
    """E[x xᵀ] of what down_proj of the first layer reads, by transformers."""
    model = load_model(folder)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.append(i[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return seen[0].T @ seen[0] / len(seen[0])


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_the_joint_form_moves_gate_and_up_to_less_error(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several batches a dimension, of which the step sees some."""
    monkeypatch.setattr(part, "BATCH_TOKENS", 8 * 64)
    monkeypatch.setattr(joint, "STEP_TOKENS", 8 * 8 * 64)
    folder = pico.save_model(tmp_path / "dense", **settings)
    anatomy = describe(folder)
    full = anatomy.layers[0]
    widths = [LayerWidths(full.ffn // 2, full.heads, full.kv_heads)] * len(anatomy.layers)
    many = np.random.default_rng(5).integers(3, 400, size=(128, 64))
    found = {}
    for form in ("sequential", "joint"):
        plan = refit(folder, anatomy, widths, {"one": many[:64], "two": many[64:]}, tmp_path / form, form=form)  # type: ignore[arg-type]
        compact(folder, plan, tmp_path / f"{form}.expert", refitted=tmp_path / form)
        found[form] = divergence(folder, tmp_path / f"{form}.expert", UNSEEN)
    assert found["joint"] < 0.97 * found["sequential"]
    dense, moved = load_weights(folder), load_weights(tmp_path / "joint")
    names = [f"model.layers.{index}.mlp.gate_proj.weight" for index in range(len(plan.layers))]
    kept = [torch.tensor(layer.ffn) for layer in plan.layers]
    assert not all(torch.equal(moved[name], dense[name][rows]) for name, rows in zip(names, kept, strict=True))


def test_the_same_windows_give_the_same_bytes(tmp_path: Path) -> None:
    folder = pico.save_model(tmp_path / "dense")
    anatomy = describe(folder)
    widths = [LayerWidths(64, layer.heads, layer.kv_heads) for layer in anatomy.layers]
    for name in ("one", "two"):
        refit(folder, anatomy, widths, {"t": SEEN}, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_windows_that_are_too_long_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folder = pico.save_model(tmp_path / "dense", max_position_embeddings=32)
    anatomy = describe(folder)
    with pytest.raises(InvalidRequest, match="max_position_embeddings"):
        refit(folder, anatomy, list(anatomy.layers), {"t": SEEN}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
