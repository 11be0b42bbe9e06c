"""Who dominates whom: as good in everything that was measured of both, and better in something, noise left out.

Bytes and bits per byte come out alike each time and are compared as they are. Speeds differ where the 95 % interval of
the ratio of their rounds excludes 1 (decision 015); without rounds of one bench, their means are compared as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cusprun.benchmarks.spread import Ratio

SIZE, SPEED, MEMORY, LOSS = "size", "speed", "memory", "loss"
AXES = (SIZE, SPEED, MEMORY)  # what is paid; LOSS is what for
MEMORY_TOLERANCE = 0.01  # peaks of one file in processes of its own lie up to 0.3 % apart (docs/results/exports*.json)


@dataclass(frozen=True)
class Figures:
    """What was measured of one artifact; None where it was not."""

    size: float
    loss: float | None  # bits per byte of the text that decides, or their increase
    speed: float | None = None  # mean of decoding, tokens per second
    memory: float | None = None  # peak, bytes
    rounds: Mapping[str, Sequence[float]] = field(default_factory=dict)  # decoding, by the bench they were rounds of


def advantage(one: Figures, other: Figures, axis: str) -> int | None:
    """1 where ``one`` is better, -1 where it is worse, 0 where they are not told apart; None where one is unmeasured.

    ``advantage(other, one, axis)`` is its negative.
    """
    own, others = getattr(one, axis), getattr(other, axis)
    if own is None or others is None:
        return None
    if axis == SPEED:
        return _faster(one, other)
    if axis == MEMORY and max(own, others) <= (1 + MEMORY_TOLERANCE) * min(own, others):
        return 0
    return int(own < others) - int(own > others)


def dominates(one: Figures, other: Figures, axes: Sequence[str] = AXES) -> bool:
    """Whether ``one`` is no worse in loss and on those of ``axes`` that were measured of both, and better in one.

    Without such an axis, or without a loss, it does not. No two dominate each other.
    """
    paid = [sign for axis in axes if (sign := advantage(one, other, axis)) is not None]
    gained = advantage(one, other, LOSS)
    if not paid or gained is None:
        return False
    return min(*paid, gained) >= 0 and max(*paid, gained) > 0


def _faster(one: Figures, other: Figures) -> int:
    pairs = [
        pair
        for bench, rounds in one.rounds.items()
        if len(rounds) == len(others := other.rounds.get(bench, ()))
        for pair in zip(rounds, others, strict=True)
    ]
    if len(pairs) > 1 and min(map(min, pairs)) > 0:
        interval = Ratio.of(*zip(*pairs, strict=True)).ci95
        assert interval is not None
        return (interval[0] > 1) - (interval[1] < 1)
    assert one.speed is not None
    assert other.speed is not None
    return (one.speed > other.speed) - (one.speed < other.speed)
