"""The integer program against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cusprun.program import Choice, Infeasible, Range, interpolate, monotone, nearest, reach, solve, sums, worthwhile


def test_it_finds_what_trying_everything_finds() -> None:
    chance = np.random.default_rng(1)
    groups = [
        [Choice(float(loss), tuple(map(float, amounts))) for loss, amounts in zip(chance.random(5), rows, strict=True)]
        for rows in chance.random((5, 5, 2))
    ]
    ranges = [Range(2.2, 2.4), Range(-np.inf, 2.3)]
    within = [
        sum(choice.loss for choice in pick)
        for pick in product(*groups)
        if 2.2 <= sum(choice.amounts[0] for choice in pick) <= 2.4 and sum(choice.amounts[1] for choice in pick) <= 2.3
    ]
    chosen = solve(groups, ranges)
    first, second = sums(groups, chosen)
    assert 2.2 <= first <= 2.4
    assert second <= 2.3
    loss = sum(group[number].loss for group, number in zip(groups, chosen, strict=True))
    assert loss == pytest.approx(min(within), rel=1e-3)


def test_choices_that_another_beats_are_left_out_and_nothing_is_lost() -> None:
    chance = np.random.default_rng(3)
    groups = [
        [Choice(float(loss), tuple(map(float, amounts))) for loss, amounts in zip(chance.random(6), rows, strict=True)]
        for rows in chance.random((4, 6, 2))
    ]
    ranges = [Range(-np.inf, 1.6), Range(-np.inf, 2.0)]
    assert worthwhile([Choice(1, (1,)), Choice(1, (1,)), Choice(2, (0.5,)), Choice(2, (1,))]) == [0, 2]
    least = min(
        sum(choice.loss for choice in pick)
        for pick in product(*groups)
        if all(sum(choice.amounts[which] for choice in pick) <= bound.high for which, bound in enumerate(ranges))
    )
    chosen = solve(groups, ranges)
    loss = sum(group[number].loss for group, number in zip(groups, chosen, strict=True))
    assert loss == pytest.approx(least, rel=2e-3)


def test_what_cannot_be_met_is_told_with_what_can() -> None:
    groups = [[Choice(0, (1,)), Choice(1, (2,))], [Choice(0, (0,)), Choice(1, (2,))]]
    with pytest.raises(Infeasible):
        solve(groups, [Range(9.9, 10.1)])
    assert reach(groups, 0) == (1, 4)


def test_the_nearest_to_what_cannot_be_met_is_as_little_over_as_can_be_and_costs_least() -> None:
    chance = np.random.default_rng(2)
    groups = [
        [Choice(float(loss), tuple(map(float, amounts))) for loss, amounts in zip(chance.random(4), rows, strict=True)]
        for rows in 0.5 + chance.random((4, 4, 2))
    ]
    ranges = [Range(-np.inf, 2.0), Range(-np.inf, 1.0)]
    with pytest.raises(Infeasible):
        solve(groups, ranges)

    def over(pick: tuple[Choice, ...]) -> float:
        return sum(
            max(0.0, sum(choice.amounts[which] for choice in pick) / bound.high - 1)
            for which, bound in enumerate(ranges)
        )

    chosen = nearest(groups, ranges)
    assert over(tuple(group[number] for group, number in zip(groups, chosen, strict=True))) == pytest.approx(
        min(map(over, product(*groups))), abs=1e-4
    )


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
