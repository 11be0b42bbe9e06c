"""Where to cut: from scores and a budget to the plan.

Within a layer units go in the order that the dimensions agreed on; between layers and kinds the cut goes where the
least squared change is added per parameter removed, in steps of the alignment. Single ablations say little about what
many removals together cost, so every layer keeps at least EVEN_SHARE of what it would keep under an even cut.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Literal

import torch

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.structure import MIN_FFN, MIN_KV_HEADS
from cusprun.errors import InvalidRequest
from cusprun.formats import block_of
from cusprun.importance.combine import LayerScores, UnitScores
from cusprun.plan import LayerPlan, Plan, make_plan

Layout = Literal["uniform", "per-layer"]

EVEN_SHARE = 0.8  # of an even cut's width stays in every layer; chosen on calibration text, see docs/decisions/003


def default_align(anatomy: Anatomy, quants: Sequence[str]) -> int:
    """Channel multiple that the runtimes like: for large models a block of the widest type, 32 otherwise."""
    wide = min(layer.ffn for layer in anatomy.layers) >= 4096
    return max(map(block_of, quants)) if wide else 32


def largest_ratio(anatomy: Anatomy, align: int) -> float:
    """The largest share of all parameters that can go when each layer keeps its smallest allowed widths."""
    smallest = tuple(
        LayerWidths(min(_ffn_floor(align), layer.ffn), layer.queries_per_kv * heads, heads)
        for layer in anatomy.layers
        for heads in (min(MIN_KV_HEADS, layer.kv_heads),)
    )
    return 1 - anatomy.with_layers(smallest).parameters / anatomy.parameters


def plan_ratio(
    anatomy: Anatomy,
    scores: Sequence[LayerScores],
    ratio: float,
    *,
    align: int,
    layout: Layout,
    even_share: float = EVEN_SHARE,
) -> Plan:
    """The plan that removes ``ratio`` of all parameters, as nearly as the alignment allows.

    ``even_share`` bounds how far per-layer widths may differ: each layer keeps at least that share of what it would
    keep under an even cut.
    Raises InvalidRequest where no allowed widths reach it.
    """
    if ratio > (largest := largest_ratio(anatomy, align)):
        raise InvalidRequest(
            f"--ratio {ratio:g} is more than this model can lose: embeddings and smallest widths leave {largest:.3f}"
        )
    target = ratio * anatomy.parameters
    if layout == "uniform":
        return _uniform(anatomy, scores, target, align)
    return _per_layer(anatomy, scores, target, align, even_share)


def plan_epsilon(
    anatomy: Anatomy, scores: Sequence[LayerScores], epsilon: float, *, align: int, layout: Layout
) -> Plan:
    """The plan that removes every unit whose relative change is at most ``epsilon`` in all dimensions.

    Widths are rounded up to the alignment, so nothing above ε ever goes. A uniform layout keeps in every layer what
    the neediest layer keeps.
    """
    widths = []
    for layer, score in zip(anatomy.layers, scores, strict=True):
        ffn = _kept_above(score.ffn, epsilon, layer.ffn, _ffn_floor(align), align)
        widths.append((ffn, _kept_above(score.attention, epsilon, layer.kv_heads, MIN_KV_HEADS, 1)))
    if layout == "uniform":
        widths = [(max(ffn for ffn, _ in widths), max(kv for _, kv in widths))] * len(widths)
        widths = [(ffn, _stock_kv_heads(anatomy, kv)) for ffn, kv in widths]
    ordered = [_irrelevant_first(score, epsilon) for score in scores]
    return make_plan(anatomy, tuple(_keep(score, ffn, kv) for score, (ffn, kv) in zip(ordered, widths, strict=True)))


def _ffn_floor(align: int) -> int:
    return -(-MIN_FFN // align) * align


def _kept_above(units: UnitScores, epsilon: float, width: int, floor: int, align: int) -> int:
    needed = int((units.change > epsilon).sum())
    return min(width, max(floor, -(-needed // align) * align))


def _irrelevant_first(score: LayerScores, epsilon: float) -> LayerScores:
    """The same order with the units at or below ε moved to the front: what ε calls irrelevant goes first."""

    def reorder(units: UnitScores) -> UnitScores:
        above = (units.change > epsilon)[units.order]
        return UnitScores(torch.cat([units.order[~above], units.order[above]]), units.change)

    return LayerScores(reorder(score.ffn), reorder(score.attention))


def _keep(score: LayerScores, ffn: int, kv_heads: int) -> LayerPlan:
    def last(units: UnitScores, count: int) -> tuple[int, ...]:
        return tuple(sorted(units.order[len(units.order) - count :].tolist()))

    return LayerPlan(last(score.ffn, ffn), last(score.attention, kv_heads))


def _stock_kv_heads(anatomy: Anatomy, at_least: int) -> int:
    """The smallest kv head count from ``at_least`` on that the family's stock config accepts in every layer."""
    first = anatomy.layers[0]
    queries = first.heads // first.kv_heads
    for kv_heads in range(at_least, first.kv_heads + 1):
        if not anatomy.family.heads_divide_hidden or anatomy.hidden_size % (kv_heads * queries) == 0:
            return kv_heads
    return first.kv_heads


def _uniform(anatomy: Anatomy, scores: Sequence[LayerScores], target: float, align: int) -> Plan:
    """One width for all layers: for each kv head count the width that meets the target; the least total change wins."""
    if not anatomy.uniform:
        raise InvalidRequest(
            "--layout uniform needs a model whose layers are alike; this one's differ: --layout per-layer"
        )
    first, count = anatomy.layers[0], len(anatomy.layers)
    queries = first.heads // first.kv_heads
    damages = [(_cumulative(score.ffn), _cumulative(score.attention)) for score in scores]
    best: tuple[float, float, int, int] | None = None
    tolerance = 0.01 * anatomy.parameters
    for kv_heads in sorted({_stock_kv_heads(anatomy, at_least) for at_least in range(1, first.kv_heads + 1)}):
        gone_heads = first.kv_heads - kv_heads
        left = target - count * gone_heads * anatomy.head_unit_parameters(queries)
        wanted = first.ffn - left / (count * anatomy.ffn_unit_parameters())
        ffn = min(first.ffn, max(_ffn_floor(align), round(wanted / align) * align))
        miss = abs(left - count * (first.ffn - ffn) * anatomy.ffn_unit_parameters())
        damage = sum(float(f[first.ffn - ffn] + a[gone_heads]) for f, a in damages)
        candidate = (max(0.0, miss - tolerance), damage, ffn, kv_heads)
        best = candidate if best is None or candidate < best else best
    if best is None:
        raise InvalidRequest("no head count of this model fits a uniform layout: --layout per-layer")
    return make_plan(anatomy, tuple(_keep(score, best[2], best[3]) for score in scores))


def _cumulative(units: UnitScores) -> torch.Tensor:
    """Sum of squared changes of the first m units in removal order, for m = 0 … units."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), units.change[units.order].square().cumsum(0)])


def _per_layer(anatomy: Anatomy, scores: Sequence[LayerScores], target: float, align: int, share: float) -> Plan:
    """Greedy over steps: always the step, in any layer and kind, that adds the least squared change per parameter."""
    tolerance = 0.01 * anatomy.parameters
    while True:
        for overshoot in (tolerance / 2, target):  # whole heads of small models are more than the tolerance
            widths, removed = _greedy(anatomy, scores, target, align, share, overshoot)
            if abs(removed - target) <= tolerance:
                break
        if abs(removed - target) <= tolerance or share == 0:
            break
        share = max(0.0, share - 0.2)  # whole heads and the alignment left too little: let the layers differ more
    return make_plan(anatomy, tuple(_keep(score, *width) for score, width in zip(scores, widths, strict=True)))


def _greedy(
    anatomy: Anatomy, scores: Sequence[LayerScores], target: float, align: int, share: float, overshoot: float
) -> tuple[list[tuple[int, int]], int]:
    """Widths (channels, kv heads) of every layer, and the parameters that are gone with them.

    A step that goes over the target by more than ``overshoot`` parameters, or by more than is missing, is left out.
    """
    removable = sum(layer.ffn * anatomy.ffn_unit_parameters() + _attention(anatomy, layer) for layer in anatomy.layers)
    kept_share = (1 - target / removable) * share
    kinds: list[_Strip] = []
    for layer, score in zip(anatomy.layers, scores, strict=True):
        floor = max(_ffn_floor(align), math.ceil(layer.ffn * kept_share))
        kinds.append(_Strip(score.ffn, layer.ffn, floor, align, anatomy.ffn_unit_parameters()))
        floor = max(MIN_KV_HEADS, math.ceil(layer.kv_heads * kept_share))
        each = anatomy.head_unit_parameters(layer.heads // layer.kv_heads)
        kinds.append(_Strip(score.attention, layer.kv_heads, floor, 1, each))
    steps = [(price, index) for index, strip in enumerate(kinds) if (price := strip.price()) is not None]
    heapq.heapify(steps)
    removed = 0
    while steps and removed < target:
        _, index = heapq.heappop(steps)
        strip = kinds[index]
        size = strip.step() * strip.each
        if removed + size - target > min(overshoot, target - removed):
            continue  # a smaller step may fit
        strip.width -= strip.step()
        removed += size
        if (price := strip.price()) is not None:
            heapq.heappush(steps, (price, index))
    return [(ffn.width, heads.width) for ffn, heads in zip(kinds[::2], kinds[1::2], strict=True)], removed


def _attention(anatomy: Anatomy, layer: LayerWidths) -> int:
    return layer.kv_heads * anatomy.head_unit_parameters(layer.heads // layer.kv_heads)


class _Strip:
    """The units of one kind in one layer, taken away step by step in removal order."""

    def __init__(self, units: UnitScores, width: int, floor: int, align: int, each: int) -> None:
        self.curve = _cumulative(units).tolist()
        self.full = self.width = width
        self.floor, self.align, self.each = floor, align, each

    def step(self) -> int:
        """Units that the next step takes: the first takes what is over the alignment."""
        return (self.width - 1) % self.align + 1

    def price(self) -> float | None:
        """Squared change added per parameter by the next step; None where the floor is reached."""
        size = self.step()
        if self.width - size < self.floor:
            return None
        gone = self.full - self.width
        return float(self.curve[gone + size] - self.curve[gone]) / (size * self.each)
