"""Statistics against a plain forward pass of transformers with hooks, and their sums over shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun import layerwise
from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.errors import InvalidRequest
from cusprun.gradients import collect_gradients
from cusprun.layerwise import LayerwiseModel
from cusprun.moments import NEEDS, LayerStatistics, Moments, UnitMoments
from cusprun.statistics import collect, load_statistics, save_statistics, stream
from tests import pico

UNIT = UnitMoments(Moments(1, torch.ones(2), torch.ones(2, 1, 1)), Moments(1, torch.ones(2), torch.ones(1, 2, 2)))
IDS = np.random.default_rng(0).integers(3, 400, size=(6, 32))


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}])
def test_moments_equal_a_plain_forward(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = pico.save_model(tmp_path / "m", **settings)
    found = collect(folder, describe(folder), {"text": IDS}, needs={"relative", "plain"}, batch_tokens=64)
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
        assert part.plain is not None
        for moments, place in ((part.plain.ffn, "ffn"), (part.plain.attention, "attention")):
            x = torch.cat(seen[index, place]).flatten(0, 1).double()
            torch.testing.assert_close(moments.diagonal() / moments.count, x.square().mean(0), rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(moments.mean(), x.mean(0), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(moments.variance(), x.var(0, correction=0), rtol=1e-3, atol=1e-6)


def test_shards_add_up(pico_model: Path) -> None:
    anatomy = describe(pico_model)
    whole, *parts = (
        collect(pico_model, anatomy, {"text": ids}, needs=NEEDS, batch_tokens=32) for ids in (IDS, IDS[:2], IDS[2:])
    )
    for layer, first, second in zip(whole, *parts, strict=True):
        total = first["text"] + second["text"]
        assert total.plain
        assert total.gradients
        assert layer["text"].plain
        assert layer["text"].gradients
        torch.testing.assert_close(total.plain.ffn.second, layer["text"].plain.ffn.second)
        torch.testing.assert_close(total.plain.attention.first, layer["text"].plain.attention.first)
        assert total.gradients.count == layer["text"].gradients.count == len(IDS)
        for name in ("ffn_vectors", "attention_vectors"):
            sums = (getattr(part.gradients, name) for part in (total, layer["text"]))
            torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(total.gradients.ffn[1], layer["text"].gradients.ffn[1], rtol=1e-4, atol=1e-9)
        assert total.ffn.count == layer["text"].ffn.count
        torch.testing.assert_close(total.ffn.second, layer["text"].ffn.second)
        torch.testing.assert_close(total.attention.second, layer["text"].attention.second)


def test_dimensions_are_kept_apart_and_files_give_them_back(tmp_path: Path, pico_model: Path) -> None:
    anatomy = describe(pico_model)
    found = collect(pico_model, anatomy, {"language": IDS[:2], "task": IDS[2:]})
    alone = collect(pico_model, anatomy, {"task": IDS[2:]})
    torch.testing.assert_close(found[1]["task"].ffn.second, alone[1]["task"].ffn.second)
    save_statistics(found, tmp_path / "statistics")
    for before, after in zip(found, load_statistics(tmp_path / "statistics"), strict=True):
        assert list(after) == ["language", "task"]
        for name, part in before.items():
            assert torch.equal(part.ffn.second, after[name].ffn.second)
            assert torch.equal(part.attention.first, after[name].attention.first)
            assert part.attention.count == after[name].attention.count


def test_files_hold_every_part(tmp_path: Path, pico_model: Path) -> None:
    anatomy, path = describe(pico_model), tmp_path / "s.safetensors"
    for needs in (NEEDS, {"plain"}, {"gradients"}, set()):
        found = collect(pico_model, anatomy, {"text": IDS[:2]}, needs=needs)
        save_statistics(found, path)
        again = load_statistics(path)
        assert len(again) == 3
        for layer, read in zip(found, again, strict=True):
            before, after = layer["text"], read["text"]
            for need in NEEDS:
                assert (getattr(after, need) is not None) == (getattr(before, need) is not None) == (need in needs)
            if before.plain and after.plain:
                assert torch.equal(before.plain.attention.second, after.plain.attention.second)
                assert before.plain.ffn.count == after.plain.ffn.count
            if before.gradients and after.gradients:
                assert torch.equal(before.gradients.attention, after.gradients.attention)
                assert torch.equal(before.gradients.ffn_vectors, after.gradients.ffn_vectors)
                assert before.gradients.count == after.gradients.count == 2


def test_only_what_was_asked_for_is_added_up() -> None:
    with pytest.raises(ValueError, match="different parts"):
        LayerStatistics() + LayerStatistics(plain=UNIT)
    assert (LayerStatistics(plain=UNIT) + LayerStatistics(plain=UNIT)).relative is None


def test_unknown_need(pico_model: Path) -> None:
    with pytest.raises(ValueError, match="hessian"):
        collect(pico_model, describe(pico_model), {"text": IDS}, needs={"hessian"})  # type: ignore[arg-type]


def test_gradients_of_some_windows(pico_model: Path) -> None:
    anatomy = describe(pico_model)
    some = collect_gradients(pico_model, anatomy, {"text": IDS}, most=3)[2]["text"]
    spread = collect_gradients(pico_model, anatomy, {"text": IDS[[0, 2, 4]]})[2]["text"]
    assert some.count == 3
    assert torch.equal(some.ffn, spread.ffn)
    with pytest.raises(InvalidRequest, match="longer than"):
        collect_gradients(pico_model, anatomy, {"text": np.tile(IDS, 20)})
    with pytest.raises(InvalidRequest, match="no text"):
        collect_gradients(pico_model, anatomy, {"text": IDS[:0]})


def test_one_layer_of_weights_at_a_time(pico_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "HELD_BYTES", 0)
    model = LayerwiseModel(pico_model, describe(pico_model))
    with model.layer(1) as layer:
        with model.layer(1) as again:
            assert again is layer
        real = [not next(layer.parameters()).is_meta for layer in model.layers]
    assert real == [False, True, False]
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())


def test_layers_that_all_fit_are_read_once(pico_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayerwiseModel(pico_model, describe(pico_model))
    read: list[str] = []
    take = type(model.weights).__getitem__
    monkeypatch.setattr(type(model.weights), "__getitem__", lambda self, name: (read.append(name), take(self, name))[1])
    for _ in range(2):
        with model.layer(1), model.head():
            pass
    assert len(read) == len(set(read)) + 1  # the final norm, a handful of numbers, is read again
    assert any(name.startswith("model.layers.1.") for name in read)


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


def test_layers_go_to_disk_as_they_come_and_come_back_one_by_one(tmp_path: Path, pico_model: Path) -> None:
    anatomy = describe(pico_model)
    left = []

    def layers() -> Iterator[dict[str, LayerStatistics]]:
        for layer in stream(pico_model, anatomy, {"text": IDS}):
            left.append(len(list(tmp_path.rglob("*.safetensors"))))
            yield layer

    save_statistics(layers(), tmp_path / "statistics")
    assert left == [0, 1, 2]
    stored, whole = load_statistics(tmp_path / "statistics"), collect(pico_model, anatomy, {"text": IDS})
    assert len(stored) == len(whole) == 3
    assert torch.equal(stored[2]["text"].attention.second, whole[2]["text"].attention.second)
    assert stored[1] is not stored[1]  # nothing is kept
    assert [len(part) for part in (stored[:2], stored[2:])] == [2, 1]
