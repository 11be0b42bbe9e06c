"""Where the published methods cut: shares, alignment, budgets, and one global cut against a plain threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cusprun.allocation_rivals import plan_even, plan_even_uniform, plan_global
from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.llama import FAMILY
from cusprun.errors import InvalidRequest
from cusprun.importance.combine import LayerScores, UnitScores

SMOLLM2 = Anatomy(FAMILY, 576, 64, 49152, (LayerWidths(1536, 9, 3),) * 30, True, False, False)
LLAMA_7B = Anatomy(FAMILY, 4096, 128, 32000, (LayerWidths(11008, 32, 32),) * 32, False, False, False)
PICO = Anatomy(FAMILY, 64, 16, 512, (LayerWidths(128, 4, 2),) * 8, True, False, False)


def units(values: torch.Tensor) -> UnitScores:
    return UnitScores(values.argsort(stable=True), values)


def scores_of(anatomy: Anatomy, seed: int = 0) -> list[LayerScores]:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> UnitScores:
        return units(torch.randn(count, generator=generator, dtype=torch.float64))

    return [LayerScores(draw(layer.ffn), draw(layer.kv_heads)) for layer in anatomy.layers]


@pytest.mark.parametrize("ratio", [0.05, 0.125, 0.25, 0.33, 0.5])
@pytest.mark.parametrize(("anatomy", "align"), [(SMOLLM2, 32), (LLAMA_7B, 256), (PICO, 8)])
def test_even_shares(anatomy: Anatomy, align: int, ratio: float) -> None:
    plan = plan_even(anatomy, scores_of(anatomy), ratio, align=align)
    assert plan.removed_share == pytest.approx(ratio, abs=0.01)
    ffn = [layer.ffn for layer in plan.expert.layers]
    kv_heads = [layer.kv_heads for layer in plan.expert.layers]
    assert all(width % align == 0 for width in ffn)
    assert max(ffn) - min(ffn) <= align
    assert max(kv_heads) - min(kv_heads) <= 1
    room = sum(layer.kv_heads - 1 for layer in anatomy.layers)
    gone_ffn = 1 - sum(ffn) / sum(layer.ffn for layer in anatomy.layers)
    all_groups = sum(layer.kv_heads for layer in anatomy.layers)
    if gone_ffn * all_groups < room:  # a group a layer stays, whatever the share
        assert 1 - sum(kv_heads) / all_groups == pytest.approx(gone_ffn, abs=1 / all_groups)


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
def test_first_and_last_layers_stay_whole(ratio: float) -> None:
    plan = plan_even(SMOLLM2, scores_of(SMOLLM2), ratio, align=32, keep_first=4, keep_last=2)
    assert plan.removed_share == pytest.approx(ratio, abs=0.01)
    assert plan.expert.layers[:4] == SMOLLM2.layers[:4]
    assert plan.expert.layers[-2:] == SMOLLM2.layers[-2:]
    assert all(layer.ffn < 1536 for layer in plan.expert.layers[4:-2])


def test_the_least_needed_go() -> None:
    scores = scores_of(SMOLLM2)
    plan = plan_even(SMOLLM2, scores, 0.25, align=32)
    for kept, score in zip(plan.layers, scores, strict=True):
        stays = torch.zeros(1536, dtype=torch.bool)
        stays[list(kept.ffn)] = True
        assert score.ffn.change[~stays].max() < score.ffn.change[stays].min()
        gone = sorted({0, 1, 2} - set(kept.kv_heads), key=lambda group: score.attention.change[group])
        assert gone == score.attention.change.argsort().tolist()[: len(gone)]


def test_layers_of_different_widths_lose_the_same_share() -> None:
    anatomy = replace(SMOLLM2, layers=(LayerWidths(1536, 9, 3), LayerWidths(768, 6, 2)) * 15)
    plan = plan_even(anatomy, scores_of(anatomy), 0.25, align=32)
    assert plan.removed_share == pytest.approx(0.25, abs=0.01)
    share = 1 - sum(layer.ffn for layer in plan.expert.layers) / sum(layer.ffn for layer in anatomy.layers)
    for before, after in zip(anatomy.layers, plan.expert.layers, strict=True):
        assert abs(before.ffn * (1 - share) - after.ffn) <= 32


@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_even_in_one_width(ratio: float) -> None:
    plan = plan_even_uniform(LLAMA_7B, scores_of(LLAMA_7B), ratio, align=256)
    assert plan.expert.uniform
    assert plan.removed_share == pytest.approx(ratio, abs=0.01)
    widths = plan.expert.layers[0]
    assert 4096 % widths.heads == 0  # what the stock config asks for
    smallest = plan_even_uniform(SMOLLM2, scores_of(SMOLLM2), ratio, align=32)
    assert smallest.expert.uniform
    assert smallest.removed_share == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_global_cut_is_a_threshold(ratio: float) -> None:
    """FLAP's own way: sort all scores, add up parameters, cut where the sum is nearest the budget."""
    scores = scores_of(LLAMA_7B)
    plan = plan_global(LLAMA_7B, scores, ratio, align=1)
    each = [(float(value), LLAMA_7B.ffn_unit_parameters()) for score in scores for value in score.ffn.change]
    each += [(float(v), LLAMA_7B.head_unit_parameters(1)) for score in scores for v in score.attention.change]
    removed, best = 0, (float("inf"), float("-inf"))
    for value, parameters in sorted(each):
        removed += parameters
        best = min(best, (abs(removed - ratio * LLAMA_7B.parameters), value))
    differing = 0
    for kept, score in zip(plan.layers, scores, strict=True):
        for stays, found in ((kept.ffn, score.ffn), (kept.kv_heads, score.attention)):
            differing += len({k for k, value in enumerate(found.change) if value > best[1]} ^ set(stays))
    # where a whole head is next and too large, the channels behind it that fit go too: less than a head's worth
    assert differing <= LLAMA_7B.head_unit_parameters(1) / LLAMA_7B.ffn_unit_parameters()
    nearest = LLAMA_7B.head_unit_parameters(1) / 2 / LLAMA_7B.parameters
    assert plan.removed_share == pytest.approx(ratio, abs=nearest)


@pytest.mark.parametrize("ratio", [0.05, 0.125, 0.25, 0.33, 0.5])
@pytest.mark.parametrize(("anatomy", "align"), [(SMOLLM2, 32), (LLAMA_7B, 256), (PICO, 8)])
def test_global_cut_aligned(anatomy: Anatomy, align: int, ratio: float) -> None:
    plan = plan_global(anatomy, scores_of(anatomy), ratio, align=align, output_biases=True)
    assert plan.removed_share == pytest.approx(ratio, abs=0.01)
    assert plan.expert.attention_bias
    assert plan.expert.mlp_bias
    assert all(layer.ffn % align == 0 and layer.kv_heads >= 1 for layer in plan.expert.layers)


def test_global_cut_goes_where_scores_are_low() -> None:
    scores = scores_of(SMOLLM2)
    low = [LayerScores(units(score.ffn.change - 3 * (i % 2)), score.attention) for i, score in enumerate(scores)]
    plan = plan_global(SMOLLM2, low, 0.2, align=32)
    assert max(layer.ffn for layer in plan.expert.layers[1::2]) < min(layer.ffn for layer in plan.expert.layers[::2])


def test_agreed_order_says_which_units_go() -> None:
    scores = scores_of(PICO)
    agreed = [LayerScores(UnitScores(s.ffn.order.flip(0), s.ffn.change), s.attention) for s in scores]
    before, after = (plan_global(PICO, given, 0.25, align=8) for given in (scores, agreed))
    assert before.expert.layers == after.expert.layers
    for kept, score in zip(after.layers, scores, strict=True):
        assert kept.ffn == tuple(sorted(score.ffn.order[: len(kept.ffn)].tolist()))


def failures() -> Sequence[tuple[str, object]]:
    return [
        ("even", lambda: plan_even(SMOLLM2, scores_of(SMOLLM2), 0.78, align=32)),
        ("middle", lambda: plan_even(SMOLLM2, scores_of(SMOLLM2), 0.7, align=32, keep_first=4, keep_last=2)),
        ("uniform", lambda: plan_even_uniform(SMOLLM2, scores_of(SMOLLM2), 0.78, align=32)),
        ("global", lambda: plan_global(SMOLLM2, scores_of(SMOLLM2), 0.78, align=32)),
    ]


@pytest.mark.parametrize(("name", "ask"), failures())
def test_more_than_the_layers_hold(name: str, ask: object) -> None:
    with pytest.raises(InvalidRequest, match=r"--ratio 0\.7"):
        ask()  # type: ignore[operator]


def test_uniform_layout_of_unlike_layers() -> None:
    anatomy = replace(SMOLLM2, layers=(LayerWidths(1536, 9, 3), LayerWidths(768, 6, 2)))
    with pytest.raises(InvalidRequest, match="--layout per-layer"):
        plan_even_uniform(anatomy, scores_of(anatomy), 0.1, align=32)
