"""The published criteria against their formulas in plain loops, on inputs that transformers gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.errors import InvalidRequest
from cusprun.importance import CRITERIA, Criterion, LayerImportance, LayerMatrices, find_criterion
from cusprun.importance.combine import combine_layer
from cusprun.importance.random import seeded
from cusprun.moments import NEEDS, LayerStatistics, Statistics
from cusprun.statistics import collect
from tests import pico

IDS = np.random.default_rng(4).integers(3, 400, size=(6, 24))
LAYER, CHANNELS, GROUPS = 1, (0, 5, 77, 127), 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save_model(tmp_path_factory.mktemp("rivals") / "m", seed=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module")
def statistics(folder: Path) -> Statistics:
    windows = {"language": IDS[:3], "task": IDS[3:], "all": IDS}
    return collect(folder, describe(folder), windows, needs=NEEDS)


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, np.ndarray]:
    """What down_proj and o_proj of one layer read, (tokens, columns)."""
    seen: dict[str, np.ndarray] = {}
    layer = model.model.layers[LAYER]
    hooks = [
        module.register_forward_hook(
            lambda m, i, o, name=name: seen.__setitem__(name, i[0].flatten(0, 1).double().numpy())
        )
        for name, module in (("ffn", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj))
    ]
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    for hook in hooks:
        hook.remove()
    return seen


def matrices(model: Any, layer: int = LAYER) -> LayerMatrices:
    block = model.model.layers[layer]
    return LayerMatrices(
        block.mlp.down_proj.weight.detach(), block.self_attn.o_proj.weight.detach(), kv_heads=GROUPS, layer=layer
    )


def scored(name: str, model: Any, statistics: Statistics) -> LayerImportance:
    return find_criterion(name).score(statistics[LAYER]["all"], matrices(model))


def column_of(matrix: torch.Tensor, column: int) -> list[float]:
    return [float(row[column]) for row in matrix]


def test_magnitude(model: Any, statistics: Statistics) -> None:
    found, given = scored("magnitude", model, statistics), matrices(model)
    norm = lambda values: math.sqrt(sum(value**2 for value in values))  # noqa: E731
    for k in CHANNELS:
        assert float(found.ffn[k]) == pytest.approx(norm(column_of(given.down, k)), rel=1e-6)
    for g in range(GROUPS):
        expected = sum(norm(column_of(given.output, j)) for j in range(g * 32, g * 32 + 32))
        assert float(found.attention[g]) == pytest.approx(expected, rel=1e-6)


def test_wanda_sp(model: Any, statistics: Statistics, inputs: dict[str, np.ndarray]) -> None:
    found, given = scored("wanda-sp", model, statistics), matrices(model)

    def column(matrix: torch.Tensor, x: np.ndarray, j: int) -> float:
        norm = math.sqrt(sum(value**2 for value in x[:, j]) / len(x))
        return sum(abs(weight) * norm for weight in column_of(matrix, j)) / len(matrix)

    for k in CHANNELS:
        assert float(found.ffn[k]) == pytest.approx(column(given.down, inputs["ffn"], k), rel=1e-4)
    for g in range(GROUPS):
        expected = sum(column(given.output, inputs["attention"], j) for j in range(g * 32, g * 32 + 32))
        assert float(found.attention[g]) == pytest.approx(expected, rel=1e-4)


def test_flap(model: Any, statistics: Statistics, inputs: dict[str, np.ndarray]) -> None:
    found, given = scored("flap", model, statistics), matrices(model)

    def standardized(matrix: torch.Tensor, x: np.ndarray, power: int) -> list[float]:
        values = []
        for j in range(x.shape[1]):
            mean = sum(x[:, j]) / len(x)
            variance = sum((value - mean) ** 2 for value in x[:, j]) / len(x)
            values.append((variance * sum(weight**2 for weight in column_of(matrix, j))) ** power)
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return [(value - mean) / spread for value in values]

    channels = standardized(given.down, inputs["ffn"], 1)
    for k in CHANNELS:
        assert float(found.ffn[k]) == pytest.approx(channels[k], rel=1e-3, abs=1e-4)
    columns = standardized(given.output, inputs["attention"], 2)
    for g in range(GROUPS):
        expected = sum(columns[g * 32 : g * 32 + 32]) / 32
        assert float(found.attention[g]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def gradients(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As LLM-Pruner's code takes them: g of the mean loss of all samples at once, F sample by sample."""
    ids = torch.from_numpy(IDS)

    def backward(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
        prefix = f"model.layers.{LAYER}."
        return {
            name.removeprefix(prefix): parameter.grad.double().clone()
            for name, parameter in model.named_parameters()
            if name.startswith(prefix)
        }

    fisher: dict[str, torch.Tensor] = {}
    for window in ids:
        for name, gradient in backward(window.unsqueeze(0)).items():
            fisher[name] = fisher.get(name, torch.zeros_like(gradient)) + gradient**2 / len(ids)
    return backward(ids), fisher


def rows_of_unit(name: str, unit: int) -> list[tuple[str, int, int]]:
    """(matrix, axis, index) of every row and column that goes with a unit."""
    if name == "ffn":
        return [("mlp.gate_proj.weight", 0, unit), ("mlp.up_proj.weight", 0, unit), ("mlp.down_proj.weight", 1, unit)]
    queries, kv = range(unit * 32, unit * 32 + 32), range(unit * 16, unit * 16 + 16)
    found = [("self_attn.q_proj.weight", 0, row) for row in queries]
    found += [("self_attn.k_proj.weight", 0, row) for row in kv] + [("self_attn.v_proj.weight", 0, row) for row in kv]
    return found + [("self_attn.o_proj.weight", 1, column) for column in queries]


def test_llm_pruner(folder: Path, statistics: Statistics) -> None:
    model = load_model(folder)
    first, fisher = gradients(model)
    weights = {name.removeprefix(f"model.layers.{LAYER}."): p.detach() for name, p in model.named_parameters()}

    def expected(variant: str, name: str, unit: int) -> float:
        total = 0.0
        for matrix, axis, index in rows_of_unit(name, unit):
            w, g, f = (tensors[matrix].double().select(axis, index).tolist() for tensors in (weights, first, fisher))
            if variant == "vector":
                total += abs(sum(a * b for a, b in zip(w, g, strict=True)))
            for a, b, c in zip(w, g, f, strict=True):
                total += {
                    "vector": 0.0,
                    "element1": abs(a * b),
                    "element2": abs(a * a * c),
                    "mix": abs(a * b - a * a * c / 2),
                }[variant]
        return total

    for variant in ("vector", "element1", "element2", "mix"):
        criterion = "llm-pruner" if variant == "element1" else f"llm-pruner-{variant}"
        found = scored(criterion, model, statistics)
        for k in CHANNELS:
            assert float(found.ffn[k]) == pytest.approx(expected(variant, "ffn", k), rel=1e-3)
        for g in range(GROUPS):
            assert float(found.attention[g]) == pytest.approx(expected(variant, "attention", g), rel=1e-3)


def test_random_is_seeded_and_differs_between_layers(model: Any, statistics: Statistics) -> None:
    seen = statistics[LAYER]["all"]
    once, again = (seeded(7).score(seen, matrices(model)) for _ in range(2))
    assert torch.equal(once.ffn, again.ffn)
    assert torch.equal(once.attention, again.attention)
    for other in (seeded(8).score(seen, matrices(model)), seeded(7).score(seen, matrices(model, 2))):
        assert not torch.equal(once.ffn, other.ffn)
    assert len(set(once.ffn.tolist())) == 128


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.name)
def test_combining_dimensions(criterion: Criterion, model: Any, statistics: Statistics) -> None:
    """Two dimensions of equal length: by rank, by score, and as the one corpus that they are together."""
    seen = {name: statistics[LAYER][name] for name in ("language", "task")}
    alone = [criterion.score(part, matrices(model)).ffn.tolist() for part in seen.values()]
    ranks = [[sorted(scores).index(score) for score in scores] for scores in alone]  # channels' scores all differ
    worst = [max(pair) for pair in zip(*ranks, strict=True)]
    largest = [max(pair) for pair in zip(*alone, strict=True)]
    given = matrices(model)
    for combine, key in (("intersection", worst), ("max", largest)):
        units = combine_layer(seen, given, criterion, combine, {}).ffn  # type: ignore[arg-type]
        assert [key[k] for k in units.order] == sorted(key)
        assert units.change.tolist() == largest
    mixed = combine_layer(seen, given, criterion, "mixture", {})
    together = criterion.score(statistics[LAYER]["all"], given)
    if criterion.name in ("llm-pruner", "llm-pruner-mix"):  # absolute values are taken in each dimension
        assert bool((mixed.ffn.change >= together.ffn * (1 - 1e-6)).all())
        return
    torch.testing.assert_close(mixed.ffn.change, together.ffn, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixed.attention.change, together.attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c.needs], ids=lambda criterion: criterion.name)
def test_what_was_not_collected_is_named(criterion: Criterion, model: Any) -> None:
    [need] = criterion.needs
    with pytest.raises(InvalidRequest, match=f"needs={{'{need}'}}"):
        criterion.score(LayerStatistics(), matrices(model))


def test_groups_must_be_told(model: Any, statistics: Statistics) -> None:
    given = LayerMatrices(matrices(model).down, matrices(model).output)
    with pytest.raises(ValueError, match="kv_heads"):
        find_criterion("wanda-sp").score(statistics[LAYER]["all"], given)
