"""Dominance: what counts as a difference, and that it is the other way round from the other side."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cusprun.benchmarks.dominance import AXES, LOSS, MEMORY, SIZE, SPEED, Figures, advantage, dominates


def timed(*rounds: float, bench: str = "") -> Figures:
    return Figures(100, 0.1, float(np.mean(rounds)), 100, {bench: rounds})


STEADY, NOISY, SLOW = timed(100, 101, 99, 100, 100), timed(100, 130, 95, 120, 101), timed(90, 91, 89, 90, 90)


@pytest.mark.parametrize(
    ("one", "other", "axis", "found"),
    [
        (STEADY, SLOW, SPEED, 1),
        (STEADY, NOISY, SPEED, 0),
        (STEADY, STEADY, SPEED, 0),
        (timed(100), timed(101), SPEED, -1),  # one round: the means
        (timed(100, 101, 99), timed(100, 101, 103, 104), SPEED, -1),  # other rounds
        (STEADY, timed(100, 130, 95, 120, 101, bench="another"), SPEED, -1),
        (timed(0, 100, 200), timed(90, 100, 200), SPEED, -1),  # no ratio of 0
        (STEADY, Figures(100, 0.1), SPEED, None),
        (Figures(1, 1, memory=1000), Figures(1, 1, memory=1010), MEMORY, 0),
        (Figures(1, 1, memory=1000), Figures(1, 1, memory=1011), MEMORY, 1),
        (Figures(1, 1), Figures(1, 1, memory=1011), MEMORY, None),
        (Figures(1000, 1), Figures(1001, 1), SIZE, 1),
        (Figures(1, 1.0), Figures(1, 1.0001), LOSS, 1),
        (Figures(1, None), Figures(1, 1.0001), LOSS, None),
    ],
)
def test_an_advantage_is_a_disadvantage_from_the_other_side(
    one: Figures, other: Figures, axis: str, found: int | None
) -> None:
    assert advantage(one, other, axis) == found
    assert advantage(other, one, axis) == (None if found is None else -found)


def test_better_in_one_thing_and_worse_in_none() -> None:
    assert dominates(STEADY, SLOW)
    assert not dominates(STEADY, STEADY)
    assert not dominates(STEADY, NOISY)
    assert not dominates(STEADY, SLOW, [SIZE, MEMORY])
    assert not dominates(Figures(1, None), Figures(2, None))
    assert not dominates(Figures(1, 1), Figures(1, 2), [SPEED])  # which was not measured
    assert dominates(Figures(1, 1), Figures(1, 2), [SPEED, SIZE])


def test_no_two_dominate_each_other() -> None:
    chance = np.random.default_rng(0)
    found = [
        Figures(
            int(chance.integers(1, 3)),
            int(chance.integers(1, 3)),
            float(np.mean(rounds)),
            int(chance.integers(1000, 1030)),
            {"": rounds} if number % 3 else {},
        )
        for number in range(40)
        for rounds in [chance.normal(100, 3, 5).tolist()]
    ]
    both = [(one, other) for one, other in product(found, found) if dominates(one, other, AXES)]
    assert both
    assert not [pair for pair in both if dominates(*reversed(pair), AXES)]
