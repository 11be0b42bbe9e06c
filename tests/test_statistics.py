"""Statistics against a plain forward pass of transformers with hooks, and their sums over shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.errors import InvalidRequest
from cusprun.statistics import Moments, collect, load_statistics, save_statistics
from tests import pico

IDS = np.random.default_rng(0).integers(3, 400, size=(6, 32))


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}])
def test_moments_equal_a_plain_forward(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = pico.save_model(tmp_path / "m", **settings)
    found = collect(folder, describe(folder), {"text": IDS}, batch_tokens=64)
    model = load_model(folder)
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for place, module in (("ffn", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj)):
            module.register_forward_hook(lambda m, i, o, k=(index, place): seen.setdefault(k, []).append(i[0]))
        layer.register_forward_hook(lambda m, i, o, k=(index, "out"): seen.setdefault(k, []).append(o))
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    groups = model.config.num_key_value_heads
    for index in range(3):
        out = torch.cat(seen[index, "out"]).flatten(0, 1).double()
        scale = out.norm(dim=1, keepdim=True)
        channels = torch.cat(seen[index, "ffn"]).flatten(0, 1).double() / scale
        heads = torch.cat(seen[index, "attention"]).flatten(0, 1).double() / scale
        part = found[index]["text"]
        assert part.ffn.count == IDS.size
        torch.testing.assert_close(part.ffn.diagonal(), channels.square().sum(0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(part.ffn.first, channels.sum(0), rtol=1e-3, atol=1e-5)
        whole = heads.T @ heads
        for group, block in enumerate(part.attention.second):
            columns = slice(group * len(block), (group + 1) * len(block))
            torch.testing.assert_close(block, whole[columns, columns], rtol=1e-4, atol=1e-7)
        assert len(part.attention.second) == groups


def test_shards_add_up(pico_model: Path) -> None:
    anatomy = describe(pico_model)
    whole = collect(pico_model, anatomy, {"text": IDS}, batch_tokens=32)
    parts = [collect(pico_model, anatomy, {"text": ids}, batch_tokens=32) for ids in (IDS[:2], IDS[2:])]
    for layer, first, second in zip(whole, *parts, strict=True):
        total = first["text"] + second["text"]
        assert total.ffn.count == layer["text"].ffn.count
        torch.testing.assert_close(total.ffn.second, layer["text"].ffn.second)
        torch.testing.assert_close(total.attention.second, layer["text"].attention.second)


def test_dimensions_are_kept_apart_and_files_give_them_back(tmp_path: Path, pico_model: Path) -> None:
    anatomy = describe(pico_model)
    found = collect(pico_model, anatomy, {"language": IDS[:2], "task": IDS[2:]})
    alone = collect(pico_model, anatomy, {"task": IDS[2:]})
    torch.testing.assert_close(found[1]["task"].ffn.second, alone[1]["task"].ffn.second)
    save_statistics(found, tmp_path / "s.safetensors")
    for before, after in zip(found, load_statistics(tmp_path / "s.safetensors"), strict=True):
        assert list(after) == ["language", "task"]
        for name, part in before.items():
            assert torch.equal(part.ffn.second, after[name].ffn.second)
            assert torch.equal(part.attention.first, after[name].attention.first)
            assert part.attention.count == after[name].attention.count


def test_one_layer_of_weights_at_a_time(pico_model: Path) -> None:
    from cusprun.statistics import _Layers

    layers = _Layers(pico_model, describe(pico_model), "cpu")
    with layers.loaded(1):
        real = [not next(layer.parameters()).is_meta for layer in layers.skeleton]
    assert real == [False, True, False]
    assert all(parameter.is_meta for layer in layers.skeleton for parameter in layer.parameters())


def test_moments_in_blocks() -> None:
    x = torch.randn(50, 6)
    assert torch.allclose(Moments.of(x, 1).second[0], (x.T @ x).double(), atol=1e-5)
    assert torch.allclose(Moments.of(x, 6).diagonal(), x.double().square().sum(0), atol=1e-5)
    assert torch.allclose(Moments.of(x, 3).diagonal(), x.double().square().sum(0), atol=1e-5)


def test_windows_longer_than_the_model_reads(tmp_path: Path) -> None:
    folder = pico.save_model(tmp_path / "m", "mistral", sliding_window=16)
    with pytest.raises(InvalidRequest, match="sliding_window, 16"):
        collect(folder, describe(folder), {"text": IDS})


def test_ids_beyond_the_embeddings(pico_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="do not belong together"):
        collect(pico_model, describe(pico_model), {"text": IDS + 1000})
