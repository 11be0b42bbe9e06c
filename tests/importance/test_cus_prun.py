"""Closed-form importance against what it stands for: the unit really taken out, one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.importance import LayerMatrices, find_criterion
from cusprun.importance.combine import combine_layer
from cusprun.moments import LayerStatistics, Moments, UnitMoments
from cusprun.statistics import collect
from tests import pico

IDS = np.random.default_rng(1).integers(3, 400, size=(3, 24))


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}])
def test_scores_equal_the_ablated_output(tmp_path: Path, settings: dict[str, object]) -> None:
    """The change of the block that reads a unit, with the unit's input zeroed in a real forward pass."""
    folder = pico.save_model(tmp_path / "m", **settings)
    anatomy, model = describe(folder), load_model(folder)
    layer = model.model.layers[1]
    matrices = LayerMatrices(layer.mlp.down_proj.weight.detach(), layer.self_attn.o_proj.weight.detach())
    seen = collect(folder, anatomy, {"text": IDS})[1]["text"]
    scores = find_criterion("cus-prun").score(seen, matrices)
    outputs: dict[str, torch.Tensor] = {}
    layer.register_forward_hook(lambda m, i, o: outputs.__setitem__("layer", o))

    def change(module: torch.nn.Linear, columns: slice) -> float:
        module_outputs: list[torch.Tensor] = []
        hook = module.register_forward_hook(lambda m, i, o: module_outputs.append(o))
        model(torch.from_numpy(IDS))
        norm = outputs["layer"].norm(dim=-1)
        kept = module.weight.data.clone()
        module.weight.data[:, columns] = 0
        model(torch.from_numpy(IDS))
        module.weight.data.copy_(kept)
        hook.remove()
        relative = (module_outputs[0] - module_outputs[1]).norm(dim=-1) / norm
        return float(relative.square().mean().sqrt())

    with torch.no_grad():
        for channel in (0, 17, 100, 127):
            expected = change(layer.mlp.down_proj, slice(channel, channel + 1))
            assert float(scores.ffn[channel]) == pytest.approx(expected, rel=1e-3)
        width = layer.self_attn.o_proj.in_features // anatomy.layers[1].kv_heads
        for group in range(anatomy.layers[1].kv_heads):
            expected = change(layer.self_attn.o_proj, slice(group * width, (group + 1) * width))
            assert float(scores.attention[group]) == pytest.approx(expected, rel=1e-3)


def statistics_of(energies: list[float]) -> LayerStatistics:
    """Four channels and one kv group with these mean squares."""
    second = torch.tensor(energies, dtype=torch.float64)
    moments = Moments(1, torch.zeros(4, dtype=torch.float64), second.reshape(4, 1, 1))
    heads = Moments(1, torch.zeros(2), torch.eye(2, dtype=torch.float64).reshape(1, 2, 2))
    return LayerStatistics(UnitMoments(moments, heads))


MATRICES = LayerMatrices(torch.eye(4), torch.ones(4, 2))
CRITERION = find_criterion("cus-prun")


def order(combine: str, **dimensions: list[float]) -> list[int]:
    seen = {name: statistics_of(energies) for name, energies in dimensions.items()}
    return combine_layer(seen, MATRICES, CRITERION, combine, {}).ffn.order.tolist()  # type: ignore[arg-type]


def test_intersection_goes_by_the_worst_rank() -> None:
    # ranks a: 0 1 2 3, b: 3 0 1 2 -> worst 3 1 2 3; channel 0 matters most to b, 3 most to a
    assert order("intersection", a=[1, 2, 3, 4], b=[40, 10, 20, 30])[:2] == [1, 2]


def test_max_goes_by_the_largest_change() -> None:
    assert order("max", a=[1, 2, 3, 4], b=[40, 10, 20, 30]) == [1, 2, 3, 0]


def test_mixture_goes_by_the_mean() -> None:
    assert order("mixture", a=[1, 2, 3, 4], b=[40, 10, 20, 30]) == [1, 2, 3, 0]
    assert order("mixture", a=[100, 2, 3, 4], b=[0, 10, 20, 300]) == [1, 2, 0, 3]


def test_one_dimension_is_its_own_order_in_every_way() -> None:
    for combine in ("intersection", "max", "mixture"):
        assert order(combine, a=[3, 1, 4, 2]) == [1, 3, 0, 2]


def test_mixture_weighs_dimensions_and_not_their_lengths() -> None:
    seen = {"a": statistics_of([1, 2, 3, 4]), "b": statistics_of([4, 3, 2, 1])}
    longer = seen["b"] + seen["b"] + seen["b"]
    once = combine_layer(seen, MATRICES, CRITERION, "mixture", {"a": 3.0}).ffn
    thrice = combine_layer({**seen, "b": longer}, MATRICES, CRITERION, "mixture", {"a": 3.0}).ffn
    torch.testing.assert_close(once.change, thrice.change)
    assert once.order.tolist() == [0, 1, 2, 3]
