"""Optimal brain surgeon against leaving out each unit in turn, and what it must survive."""

from __future__ import annotations

import pytest
import torch

from cusprun.errors import Failed
from cusprun.surgeon import choose_columns, choose_groups, solve_symmetric

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def correlated(tokens: int, n: int) -> torch.Tensor:
    """Inputs whose columns explain one another in part."""
    return random(tokens, n // 2) @ random(n // 2, n) + 0.3 * random(tokens, n)


def moments_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def best_error(matrix: torch.Tensor, x: torch.Tensor, kept: list[int]) -> float:
    """The squared change of the output that no update of the kept columns can go below."""
    wanted = x @ matrix.T
    solution = torch.linalg.lstsq(x[:, kept], wanted).solution
    return float((wanted - x[:, kept] @ solution).square().sum())


def without(gone: int, n: int) -> list[int]:
    return [index for index in range(n) if index != gone]


def test_the_first_column_to_go_costs_least_of_all() -> None:
    x, matrix = correlated(500, 10), random(4, 10)
    costs = [best_error(matrix, x, without(column, 10)) for column in range(10)]
    (gone,) = set(range(10)) - set(choose_columns(matrix, [moments_of(x)], [9])[0])
    assert costs[gone] <= 1.05 * min(costs)


def test_smaller_numbers_keep_part_of_what_larger_ones_keep() -> None:
    x, matrix = correlated(500, 16), random(4, 16)
    twelve, eight, none = (set(kept) for kept in choose_columns(matrix, [moments_of(x)], [12, 8, 0]))
    assert (len(twelve), len(eight), len(none)) == (12, 8, 0)
    assert eight < twelve


def test_updates_between_the_blocks_see_what_neighbours_took_over() -> None:
    """Twins: each alone is free, both together are not."""
    x, matrix = random(600, 12), 0.05 * random(4, 12)
    x[:, 6:8] = x[:, 0:2]
    matrix[:, [0, 1, 6, 7]] *= 40
    kept = set(choose_columns(matrix, [moments_of(x)], [4])[0])
    assert {0, 6} & kept
    assert {1, 7} & kept


def test_dead_channels_go_first() -> None:
    x, matrix = correlated(300, 12), random(4, 12)
    x[:, [1, 4, 6]] = 0
    assert not {1, 4, 6} & set(choose_columns(matrix, [moments_of(x)], [9])[0])


def test_inputs_that_are_all_zero_are_refused() -> None:
    with pytest.raises(Failed, match="zero throughout"):
        choose_columns(random(4, 6), [torch.zeros(6, 6, dtype=torch.float64)], [3])


@pytest.mark.parametrize("agreement", ["intersection", "max"])
def test_every_judge_keeps_what_it_needs(agreement: str) -> None:
    """Two corpora that use different columns: what either needs stays, what neither needs goes."""
    one, other, matrix = random(500, 9), random(500, 9), random(4, 9)
    one[:, 3:] *= 0.01
    other[:, :3] *= 0.01
    other[:, 6:] *= 0.01
    kept = choose_columns(matrix, [moments_of(one), moments_of(other)], [6], agreement)[0]
    assert kept == [0, 1, 2, 3, 4, 5]
    assert choose_columns(matrix, [moments_of(one)], [3])[0] == [0, 1, 2]


def test_groups_go_whole_and_the_cheapest_first() -> None:
    x, matrix = random(400, 12), random(5, 12)
    matrix[:, 4:8] *= 0.01
    assert choose_groups(matrix, [moments_of(x)], [3, 2, 0], run=4) == [[0, 1, 2], [0, 2], []]


def test_singular_moments_are_solved() -> None:
    low = random(10, 3)
    left = low @ low.T
    right = left @ random(10, 2)
    torch.testing.assert_close(left @ solve_symmetric(left, right), right, rtol=1e-4, atol=1e-6)
