"""Where the published methods cut: the same share everywhere, or one cut through the scores of all layers.

The budget counts all parameters, embeddings included, and alone decides how deep the cut goes. FFN widths are multiples
of the alignment, or the whole width; kv groups go whole. Layers keep MIN_FFN channels and one kv group at least.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cusprun.anatomy import Anatomy
from cusprun.anatomy.structure import MIN_FFN, MIN_KV_HEADS
from cusprun.errors import InvalidRequest
from cusprun.importance.combine import LayerScores, UnitScores
from cusprun.plan import LayerPlan, Plan, make_plan

TOLERANCE = 0.01  # of all parameters


def plan_even(
    anatomy: Anatomy,
    scores: Sequence[LayerScores],
    ratio: float,
    *,
    align: int,
    keep_first: int = 0,
    keep_last: int = 0,
) -> Plan:
    """The plan that removes ``ratio`` of all parameters by the same share of every kind in every layer between.

    ``keep_first`` and ``keep_last`` layers stay whole. An equal share of few kv groups is seldom a whole number: then
    the groups that go are as many over the whole model as the share says, in each layer one of the two nearest whole
    numbers, spread evenly over the depth, and the FFN, which the alignment rounds the same way, makes up the rest.
    Raises InvalidRequest where the layers between cannot lose that much.
    """
    between = range(keep_first, len(anatomy.layers) - keep_last)
    room = _Room.of(anatomy, between, align)
    target = ratio * anatomy.parameters
    if target > room.parameters:
        raise InvalidRequest(
            f"--ratio {ratio:g} is more than the {len(between)} layers that are cut can lose: smallest widths leave "
            f"{room.parameters / anatomy.parameters:.3f}"
        )
    groups_in_all, channels_in_all = sum(room.kv_heads), sum(room.ffn)
    share = target / (groups_in_all * room.group + channels_in_all * room.channel)
    groups = min(math.floor(share * groups_in_all + 0.5), sum(room.free_kv_heads))
    while groups and groups * room.group > target:
        groups -= 1
    while target - groups * room.group > sum(room.free_ffn) * room.channel:
        groups += 1
    gone_groups = _spread(room.kv_heads, groups, room.free_kv_heads)
    wanted = (target - groups * room.group) / channels_in_all / room.channel if channels_in_all else 0.0
    kept_channels = _rounded(room.ffn, wanted, align)
    widths = [(layer.ffn, layer.kv_heads) for layer in anatomy.layers]
    for index, channels, gone in zip(between, kept_channels, gone_groups, strict=True):
        widths[index] = channels, anatomy.layers[index].kv_heads - gone
    return _plan(anatomy, scores, widths)


def plan_even_uniform(anatomy: Anatomy, scores: Sequence[LayerScores], ratio: float, *, align: int) -> Plan:
    """The same where every layer must have one width and stock transformers must load it.

    Of the pairs of kv groups and channels that come within 1 % of all parameters of the budget, or else nearest to it,
    the one whose kinds lose the most equal shares. Raises InvalidRequest where layers differ or the ratio is too large.
    """
    if not anatomy.uniform:
        raise InvalidRequest(
            "--layout uniform needs a model whose layers are alike; this one's differ: --layout per-layer"
        )
    first, count = anatomy.layers[0], len(anatomy.layers)
    room = _Room.of(anatomy, range(count), align)
    target = ratio * anatomy.parameters
    best: tuple[float, float, int, int] | None = None
    for kv_heads in range(MIN_KV_HEADS, first.kv_heads + 1):
        if anatomy.family.heads_divide_hidden and anatomy.hidden_size % (kv_heads * first.queries_per_kv):
            continue
        left = target - count * (first.kv_heads - kv_heads) * room.group
        [ffn] = _rounded([first.ffn], left / (count * room.channel * first.ffn), align)
        miss = abs(left - count * (first.ffn - ffn) * room.channel)
        unequal = abs(kv_heads / first.kv_heads - ffn / first.ffn)
        candidate = (max(0.0, miss - TOLERANCE * anatomy.parameters), unequal, ffn, kv_heads)
        best = candidate if best is None or candidate < best else best
    if best is None or target - room.parameters > TOLERANCE * anatomy.parameters:
        raise InvalidRequest(f"--ratio {ratio:g} cannot be had with one width for all layers: --layout per-layer")
    return _plan(anatomy, scores, [best[2:]] * count)


def plan_global(
    anatomy: Anatomy, scores: Sequence[LayerScores], ratio: float, *, align: int, output_biases: bool = False
) -> Plan:
    """The plan that removes the model's lowest-scored units until ``ratio`` of all parameters is gone.

    The scores must compare across layers and kinds. As FLAP does, the cut falls where the parameters that are gone come
    nearest the budget. Channels go in steps of the alignment by the mean score of a step; where the next step is a kv
    group too large, later ones that fit take the rest. How many units go is decided by each layer's sorted scores,
    which ones by the order that the dimensions agreed on. ``output_biases`` gives the expert biases, at the cost of
    their parameters. Raises InvalidRequest where smallest widths leave too much.
    """
    biased = make_plan(anatomy, _whole(anatomy), attention_bias=output_biases, mlp_bias=output_biases).expert
    room = _Room.of(biased, range(len(anatomy.layers)), align)
    target = ratio * anatomy.parameters + biased.parameters - anatomy.parameters
    if target > room.parameters:
        largest = (room.parameters + anatomy.parameters - biased.parameters) / anatomy.parameters
        raise InvalidRequest(
            f"--ratio {ratio:g} is more than this model can lose: embeddings and smallest widths leave {largest:.3f}"
        )
    widths = [[layer.ffn, layer.kv_heads] for layer in anatomy.layers]
    queues = []
    for index, (score, layer) in enumerate(zip(scores, anatomy.layers, strict=True)):
        steps = _steps(score.ffn, layer.ffn - room.free_ffn[index], align)
        queues.append(_Queue(index, 0, room.channel, steps))
        queues.append(_Queue(index, 1, room.group, _steps(score.attention, MIN_KV_HEADS, 1)))
    heap = [(step[0], place, step[1]) for place, queue in enumerate(queues) if (step := next(queue.steps, None))]
    heapq.heapify(heap)
    removed = 0
    while heap and removed < target:
        _, place, size = heapq.heappop(heap)
        queue = queues[place]
        if removed + size * queue.each - target > target - removed:
            continue  # nearer without it; a smaller step may fit
        widths[queue.layer][queue.kind] -= size
        removed += size * queue.each
        if step := next(queue.steps, None):
            heapq.heappush(heap, (step[0], place, step[1]))
    return _plan(anatomy, scores, [(ffn, kv_heads) for ffn, kv_heads in widths], output_biases)


@dataclass(frozen=True)
class _Queue:
    """The steps in which one layer's units of one kind go."""

    layer: int
    kind: int  # 0 channels, 1 kv groups
    each: int  # parameters of a unit
    steps: Iterator[tuple[float, int]]


def _steps(units: UnitScores, floor: int, align: int) -> Iterator[tuple[float, int]]:
    """Mean score and number of units of each step down to ``floor``; the first takes what is over the alignment."""
    values = units.change.sort().values.tolist()
    gone, width = 0, len(values)
    while width - (size := (width - 1) % align + 1) >= floor:
        yield math.fsum(values[gone : gone + size]) / size, size
        gone, width = gone + size, width - size


@dataclass(frozen=True)
class _Room:
    """What some layers have and what of it may go."""

    ffn: list[int]
    kv_heads: list[int]
    free_ffn: list[int]
    free_kv_heads: list[int]
    channel: int  # parameters of a channel
    group: int  # parameters of a kv group

    @classmethod
    def of(cls, anatomy: Anatomy, indices: Sequence[int], align: int) -> _Room:
        layers = [anatomy.layers[index] for index in indices]
        queries = {layer.queries_per_kv for layer in anatomy.layers if layer.kv_heads}
        if len(queries) != 1:
            raise InvalidRequest("the layers of this model have different numbers of query heads on a kv head")
        floor = -(-MIN_FFN // align) * align
        return cls(
            ffn=[layer.ffn for layer in layers],
            kv_heads=[layer.kv_heads for layer in layers],
            free_ffn=[max(0, layer.ffn - floor) for layer in layers],
            free_kv_heads=[max(0, layer.kv_heads - MIN_KV_HEADS) for layer in layers],
            channel=anatomy.ffn_unit_parameters(),
            group=anatomy.head_unit_parameters(queries.pop()),
        )

    @property
    def parameters(self) -> int:
        return sum(self.free_ffn) * self.channel + sum(self.free_kv_heads) * self.group


def _spread(units: Sequence[int], gone: int, free: Sequence[int]) -> list[int]:
    """``gone`` units shared out in proportion to ``units``, at most ``free`` a layer; the rounding is carried on."""
    whole, found = sum(units), []
    seen = taken = 0
    for count, most in zip(units, free, strict=True):
        seen += count
        found.append(min(most, math.floor(seen * gone / whole + 0.5) - taken))
        taken += found[-1]
    for index in sorted(range(len(units)), key=lambda index: found[index] - free[index]):  # most room first
        more = min(gone - taken, free[index] - found[index])
        found[index] += more
        taken += more
    return found


def _rounded(channels: Sequence[int], share: float, align: int) -> list[int]:
    """Channels that stay where ``share`` goes: multiples of ``align``, or all. The rounding is carried on."""
    floor, found, carried = -(-MIN_FFN // align) * align, [], 0.0
    for count in channels:
        wanted = count * (1 - share) + carried
        allowed = {count, *range(min(floor, count), count, align)} if floor < count else {count}
        found.append(min(sorted(allowed), key=lambda width, wanted=wanted: abs(width - wanted)))  # type: ignore[misc]
        carried = wanted - found[-1]
    return found


def _whole(anatomy: Anatomy) -> tuple[LayerPlan, ...]:
    return tuple(LayerPlan(tuple(range(layer.ffn)), tuple(range(layer.kv_heads))) for layer in anatomy.layers)


def _plan(
    anatomy: Anatomy, scores: Sequence[LayerScores], widths: Sequence[tuple[int, int]], biases: bool = False
) -> Plan:
    layers = tuple(
        LayerPlan(score.ffn.last(ffn), score.attention.last(kv_heads))
        for score, (ffn, kv_heads) in zip(scores, widths, strict=True)
    )
    return make_plan(anatomy, layers, attention_bias=biases, mlp_bias=biases)
