"""The integer program against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cusprun.errors import InvalidRequest
from cusprun.program import Choice, interpolate, monotone, solve


def test_it_finds_what_trying_everything_finds() -> None:
    chance = np.random.default_rng(1)
    groups = [
        [Choice(float(loss), float(removed)) for loss, removed in zip(chance.random(5), chance.random(5), strict=True)]
        for _ in range(5)
    ]
    target, tolerance = 2.5, 0.05
    within = [
        sum(choice.loss for choice in pick)
        for pick in product(*groups)
        if abs(sum(choice.removed for choice in pick) - target) <= tolerance
    ]
    chosen = solve(groups, target, tolerance)
    pick = [group[number] for group, number in zip(groups, chosen, strict=True)]
    assert abs(sum(choice.removed for choice in pick) - target) <= tolerance
    assert sum(choice.loss for choice in pick) == pytest.approx(min(within), rel=1e-3)


def test_what_cannot_be_met_is_refused_with_what_can() -> None:
    with pytest.raises(InvalidRequest, match="remove 1 to 4"):
        solve([[Choice(0, 1), Choice(1, 2)], [Choice(0, 0), Choice(1, 2)]], 10, 0.1)


def test_monotone_is_the_nearest_that_does_not_fall() -> None:
    assert monotone([0.0, 0.3, 0.1, 0.5]).tolist() == pytest.approx([0, 0.2, 0.2, 0.5])
    assert monotone([0.0, -0.3, 0.4]).min() == 0


def test_between_the_levels_losses_rise_and_at_them_they_are_the_measured_ones() -> None:
    wanted = list(range(0, 101, 5))
    found = interpolate([0, 25, 50, 100], [0.0, 0.1, 0.3, 2.0], wanted)
    assert [found[wanted.index(level)] for level in (0, 25, 50, 100)] == pytest.approx([0, 0.1, 0.3, 2.0])
    assert (np.diff(found) >= 0).all()
    with pytest.raises(ValueError, match="outside"):
        interpolate([0, 50], [0, 1], [60])
