"""From scores to widths: budgets met, floors and alignment held, order followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cusprun.allocation import Layout, default_align, largest_ratio, plan_epsilon, plan_ratio
from cusprun.anatomy import Anatomy, LayerWidths, describe
from cusprun.errors import InvalidRequest
from cusprun.importance.combine import LayerScores, UnitScores
from cusprun.plan import Plan
from tests import pico

BIG = LayerWidths(1536, 9, 3)


def anatomy_of(layers: int = 12, widths: LayerWidths = BIG) -> Anatomy:
    from cusprun.anatomy import FAMILIES

    return Anatomy(FAMILIES[0], 576, 64, 8192, (widths,) * layers, tied=True, attention_bias=False, mlp_bias=False)


def random_scores(anatomy: Anatomy, seed: int = 0) -> list[LayerScores]:
    generator = torch.Generator().manual_seed(seed)

    def units(count: int) -> UnitScores:
        change = torch.rand(count, generator=generator, dtype=torch.float64)
        return UnitScores(torch.argsort(change), change)

    return [LayerScores(units(layer.ffn), units(layer.kv_heads)) for layer in anatomy.layers]


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.33, 0.5])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_ratio_is_the_share_of_all_parameters(ratio: float, layout: Layout) -> None:
    anatomy = anatomy_of()
    plan = plan_ratio(anatomy, random_scores(anatomy), ratio, align=32, layout=layout)
    assert plan.removed_share == pytest.approx(ratio, abs=0.01)
    assert plan.expert.parameters == anatomy.parameters - round(plan.removed_share * anatomy.parameters)
    if layout == "uniform":
        assert plan.expert.uniform


@pytest.mark.parametrize("align", [32, 64, 256])
def test_widths_are_aligned_and_no_layer_is_emptied(align: int) -> None:
    anatomy = anatomy_of()
    plan = plan_ratio(anatomy, random_scores(anatomy), 0.5, align=align, layout="per-layer")
    assert all(layer.ffn % align == 0 for layer in plan.expert.layers)
    assert all(layer.ffn >= max(32, align) and layer.kv_heads >= 1 for layer in plan.expert.layers)
    assert all(layer.heads == 3 * layer.kv_heads for layer in plan.expert.layers)


def test_within_a_layer_the_order_is_followed() -> None:
    anatomy = anatomy_of(2)
    scores = random_scores(anatomy)
    plan = plan_ratio(anatomy, scores, 0.25, align=32, layout="per-layer")
    for kept, score in zip(plan.layers, scores, strict=True):
        gone = set(range(1536)) - set(kept.ffn)
        assert gone == set(score.ffn.order[: len(gone)].tolist())
        assert list(kept.ffn) == sorted(kept.ffn)


def test_layers_that_matter_keep_more() -> None:
    anatomy = anatomy_of(4)
    scores = random_scores(anatomy)
    scores[2] = LayerScores(UnitScores(scores[2].ffn.order, scores[2].ffn.change * 10), scores[2].attention)
    widths = [layer.ffn for layer in plan_ratio(anatomy, scores, 0.25, align=32, layout="per-layer").expert.layers]
    assert widths[2] == max(widths)
    assert widths[2] > min(widths)


def test_a_single_kv_head_is_never_removed() -> None:
    anatomy = anatomy_of(widths=LayerWidths(1536, 9, 1))
    plan = plan_ratio(anatomy, random_scores(anatomy), 0.4, align=32, layout="per-layer")
    assert plan.removed_share == pytest.approx(0.4, abs=0.01)
    assert {layer.kv_heads for layer in plan.expert.layers} == {1}


def test_epsilon_removes_what_no_dimension_needs_and_nothing_else() -> None:
    anatomy = anatomy_of(3)
    scores = random_scores(anatomy)
    plan = plan_epsilon(anatomy, scores, 0.3, align=32, layout="per-layer")
    for kept, score in zip(plan.layers, scores, strict=True):
        gone = sorted(set(range(1536)) - set(kept.ffn))
        assert float(score.ffn.change[gone].max()) <= 0.3
        irrelevant = int((score.ffn.change <= 0.3).sum())
        assert irrelevant - 32 < len(gone) <= irrelevant
        assert all(float(score.attention.change[g]) <= 0.3 for g in set(range(3)) - set(kept.kv_heads))


def test_epsilon_with_an_order_by_rank_still_removes_only_the_irrelevant() -> None:
    anatomy = anatomy_of(1)
    score = random_scores(anatomy)[0]
    shuffled = UnitScores(torch.randperm(1536, generator=torch.Generator().manual_seed(5)), score.ffn.change)
    plan = plan_epsilon(anatomy, [LayerScores(shuffled, score.attention)], 0.5, align=32, layout="per-layer")
    gone = sorted(set(range(1536)) - set(plan.layers[0].ffn))
    assert gone
    assert float(score.ffn.change[gone].max()) <= 0.5


def test_epsilon_grows_the_cut() -> None:
    anatomy = anatomy_of(3)
    scores = random_scores(anatomy)
    shares = [plan_epsilon(anatomy, scores, e, align=32, layout="uniform").removed_share for e in (0.1, 0.3, 0.9)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_uniform_head_counts_are_such_that_stock_transformers_loads_them() -> None:
    anatomy = anatomy_of(widths=LayerWidths(512, 9, 9))  # 576 is divisible by 1 2 3 4 6 8 9, not by 5 or 7
    for ratio in (0.2, 0.3, 0.4, 0.5):
        plan = plan_ratio(anatomy, random_scores(anatomy), ratio, align=32, layout="uniform")
        assert 576 % plan.expert.layers[0].heads == 0


def test_ratios_that_the_model_cannot_lose() -> None:
    anatomy = anatomy_of(2)
    with pytest.raises(InvalidRequest, match="more than this model can lose"):
        plan_ratio(anatomy, random_scores(anatomy), largest_ratio(anatomy, 32) + 0.01, align=32, layout="per-layer")


def test_the_largest_ratio_can_be_reached() -> None:
    anatomy = anatomy_of(4)
    largest = largest_ratio(anatomy, 32)
    plan = plan_ratio(anatomy, random_scores(anatomy), largest - 0.001, align=32, layout="per-layer")
    assert plan.removed_share == pytest.approx(largest, abs=0.01)


def test_plans_survive_json() -> None:
    anatomy = anatomy_of(2)
    plan = plan_ratio(anatomy, random_scores(anatomy), 0.25, align=32, layout="per-layer")
    assert Plan.from_json(plan.to_json(), anatomy) == plan


def test_default_alignment() -> None:
    assert default_align(anatomy_of(), ["q4_k_m"]) == 32
    large = anatomy_of(widths=LayerWidths(8192, 9, 3))
    assert default_align(large, ["q4_k_m"]) == 256
    assert default_align(large, ["q8_0"]) == 32


def test_costs_are_those_of_the_removed_tensors(tmp_path: Path) -> None:
    folder = pico.save_model(tmp_path / "m", attention_bias=True, mlp_bias=True)
    anatomy = describe(folder)
    fewer = anatomy.with_layers((LayerWidths(127, 4, 2), *anatomy.layers[1:]))
    assert anatomy.parameters - fewer.parameters == anatomy.ffn_unit_parameters()
    fewer = anatomy.with_layers((LayerWidths(128, 2, 1), *anatomy.layers[1:]))
    assert anatomy.parameters - fewer.parameters == anatomy.head_unit_parameters(2)
