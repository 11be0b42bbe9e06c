"""ShortGPT against the definition of layer influence on transformers' own hidden states."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.anatomy import Anatomy, describe
from cusprun.checkpoint import load_model
from cusprun.compact import compact
from cusprun.errors import InvalidRequest
from cusprun.importance.shortgpt import drop_layers, measure_influence, shortgpt_plan
from tests import pico

WINDOWS = {
    "language": np.random.default_rng(0).integers(3, 400, size=(5, 32)),
    "task": np.random.default_rng(1).integers(3, 400, size=(2, 24)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save_model(tmp_path_factory.mktemp("shortgpt") / "m", num_hidden_layers=6)


def states_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Hidden states in front of every layer and behind the last, (layers + 1, tokens, hidden)."""
    model = load_model(folder)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return torch.stack(seen).flatten(1, 2).double().numpy()


def influence_of(folder: Path) -> np.ndarray:
    """1 - mean cosine, in numpy."""
    states = np.concatenate([states_of(folder, ids) for ids in WINDOWS.values()], axis=1)
    before, after = states[:-1], states[1:]
    cosines = (before * after).sum(-1) / (np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1))
    found: np.ndarray = 1 - cosines.mean(-1)
    return found


def test_influence_is_the_definition(folder: Path) -> None:
    found = measure_influence(folder, describe(folder), WINDOWS)
    np.testing.assert_allclose(found, influence_of(folder), atol=1e-6)
    assert max(found) - min(found) > 1e-3  # the layers differ


def test_a_layer_that_does_nothing_goes_first(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "idle")
    tensors = load_file(folder / "model.safetensors")
    for place in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.3.{place}.weight"].zero_()
    save_file(tensors, tmp_path / "idle" / "model.safetensors", metadata={"format": "pt"})
    anatomy = describe(tmp_path / "idle")
    one = anatomy.layer_parameters(anatomy.layers[0]) / anatomy.parameters
    plan = shortgpt_plan(tmp_path / "idle", anatomy, WINDOWS, one, "cpu")
    assert [index for index, kept in enumerate(plan.layers) if kept.dropped] == [3]
    compact(tmp_path / "idle", plan, tmp_path / "expert")
    ids = torch.from_numpy(WINDOWS["task"])
    with torch.no_grad():
        dense, expert = (load_model(path)(ids).logits for path in (tmp_path / "idle", tmp_path / "expert"))
    torch.testing.assert_close(expert, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.33, 0.5, 0.6])
def test_the_ratio_is_met_as_nearly_as_whole_layers_allow(folder: Path, ratio: float) -> None:
    anatomy = describe(folder)
    plan = drop_layers(anatomy, [0.6, 0.1, 0.5, 0.2, 0.4, 0.3], ratio)
    one = anatomy.layer_parameters(anatomy.layers[0]) / anatomy.parameters
    shares = {count: count * one for count in range(1, 6)}
    nearest = min(shares, key=lambda count: abs(shares[count] - ratio))
    assert [index for index, kept in enumerate(plan.layers) if kept.dropped] == sorted([1, 3, 5, 4, 2][:nearest])
    assert plan.removed_share == pytest.approx(shares[nearest])
    assert len(plan.expert.layers) == 6 - nearest


def test_more_than_all_layers_but_one(folder: Path) -> None:
    anatomy = describe(folder)
    with pytest.raises(InvalidRequest, match="more than whole layers can give"):
        drop_layers(anatomy, [0.1] * 6, 0.9)


def test_the_first_layer_may_go_whole(folder: Path) -> None:
    anatomy: Anatomy = describe(folder)
    plan = drop_layers(anatomy, [0.0, *[1.0] * 5], 0.05)
    assert plan.sources == (1, 2, 3, 4, 5)
