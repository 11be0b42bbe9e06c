"""The integer program that spends a budget: one choice for every layer and one for the vocabulary, least loss in sum.

Each group (a layer, the vocabulary) offers choices with a measured loss and amounts (parameters, bytes, seconds);
exactly one of each is taken, so that every amount's sum lies within its range and the losses add up to the least.
HiGHS solves it through SciPy. That losses of single groups add up is the one assumption; the caller bounds how far it
is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cusprun.errors import Failed
from cusprun.progress import stdout_aside

TIME_LIMIT = 60.0  # seconds; the gap is closed long before on every model tried
GAP = 1e-4
WIDE_GAP = 1e-3  # where amounts have upper ends alone; losses are not measured to better than that


@dataclass(frozen=True)
class Choice:
    """One way to cut a group."""

    loss: float  # nats that it adds, at least 0
    amounts: tuple[float, ...]  # of what is bounded: parameters, bytes, seconds, one for each range


@dataclass(frozen=True)
class Range:
    """Where the sum of one amount has to lie."""

    low: float
    high: float


class Infeasible(Exception):
    """No choices meet every range."""


def monotone(values: Sequence[float]) -> np.ndarray:
    """The non-decreasing sequence nearest to ``values`` in least squares, and nowhere below 0: (n,) float64."""
    from scipy.optimize import isotonic_regression

    return np.maximum(isotonic_regression(np.asarray(values, dtype=np.float64)).x, 0.0)


def interpolate(levels: Sequence[float], losses: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Losses at ``wanted`` amounts of removal from those measured at ``levels``, ascending, made monotone first.

    A monotone cubic (PCHIP; Fritsch and Carlson 1980) through the measured points, the first of which is no removal at
    no loss. Raises ValueError where a wanted level lies outside the measured ones.
    """
    from scipy.interpolate import PchipInterpolator

    if len(levels) < 2 or list(levels) != sorted(set(levels)):
        raise ValueError("levels have to ascend and to be two at least")
    if min(wanted) < levels[0] or max(wanted) > levels[-1]:
        raise ValueError(f"wanted levels lie outside {levels[0]} to {levels[-1]}")
    found: np.ndarray = PchipInterpolator(levels, monotone(losses))(wanted)
    return found


def solve(groups: Sequence[Sequence[Choice]], ranges: Sequence[Range], gap: float | None = None) -> list[int]:
    """The choice of every group, by number: least total loss with every amount's sum in its range.

    ``gap`` is the share of the loss by which the best may be missed; WIDE_GAP where only upper ends are given and it is
    not, else GAP. Raises Infeasible where there are no such choices.
    """
    if any(bound.low > -np.inf for bound in ranges):
        return _Program(groups, ranges, GAP if gap is None else gap).least_loss()
    kept = [worthwhile(group) for group in groups]
    fewer = [[group[place] for place in places] for group, places in zip(groups, kept, strict=True)]
    chosen = _Program(fewer, ranges, WIDE_GAP if gap is None else gap).least_loss()
    return [places[number] for places, number in zip(kept, chosen, strict=True)]


def worthwhile(group: Sequence[Choice]) -> list[int]:
    """Numbers of the choices that no other beats in the loss and in every amount; of equal ones the first."""
    values = np.array([(choice.loss, *choice.amounts) for choice in group])
    no_more = (values[:, None] <= values[None]).all(-1)  # [a, b]: a is nowhere more than b
    equal = no_more & no_more.T
    beaten = (no_more & ~equal).any(0) | np.triu(equal, 1).any(0)
    return [int(place) for place in np.flatnonzero(~beaten)]


def nearest(groups: Sequence[Sequence[Choice]], ranges: Sequence[Range]) -> list[int]:
    """The choices whose sums are the least over the upper ends of ``ranges``, in shares of them added up.

    The lower ends do not count. Among those the one of least loss: what can be had where not all can.
    """
    return _Program(groups, ranges).nearest()


def sums(groups: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> list[float]:
    """The sum of every amount over the chosen ones."""
    picked = [group[number].amounts for group, number in zip(groups, chosen, strict=True)]
    return [sum(column) for column in zip(*picked, strict=True)]


def reach(groups: Sequence[Sequence[Choice]], amount: int) -> tuple[float, float]:
    """The least and the most that one amount may come to."""
    each = [[choice.amounts[amount] for choice in group] for group in groups]
    return sum(map(min, each)), sum(map(max, each))


class _Program:
    """Choices as binary variables, groups and ranges as rows of a matrix, each range in units of its upper end."""

    def __init__(self, groups: Sequence[Sequence[Choice]], ranges: Sequence[Range], gap: float = GAP) -> None:
        from scipy.sparse import csr_matrix, vstack

        self.groups, self.ranges, self.gap = groups, ranges, gap
        self.counts = [len(group) for group in groups]
        flat = [choice for group in groups for choice in group]
        self.losses = np.array([choice.loss for choice in flat])
        self.scale = np.array([max(abs(bound.high), 1e-12) for bound in ranges])
        rows = np.repeat(np.arange(len(groups)), self.counts)
        one_each = csr_matrix((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(groups), len(flat)))
        amounts = np.array([choice.amounts for choice in flat]).reshape(len(flat), len(ranges)).T
        self.matrix = vstack([one_each, csr_matrix(amounts / self.scale[:, None])])
        self.low = np.array([bound.low for bound in ranges]) / self.scale
        self.high = np.array([bound.high for bound in ranges]) / self.scale

    def least_loss(self, over: np.ndarray | float = 0.0) -> list[int]:
        """Upper ends may be exceeded by ``over`` of their shares."""
        found = self._solve(self.losses, self.matrix, self.low, self.high + over)
        return self._chosen(found)

    def nearest(self) -> list[int]:
        from scipy.sparse import csr_matrix, hstack, vstack

        count, slacks = len(self.losses), len(self.ranges)
        below = vstack([csr_matrix((len(self.groups), slacks)), csr_matrix(-np.eye(slacks))])
        wide = hstack([self.matrix, below]).tocsr()
        objective = np.append(np.zeros(count), np.ones(slacks))
        found = self._solve(objective, wide, np.full(slacks, -np.inf), self.high, slacks)
        self.low = np.full(slacks, -np.inf)
        return self.least_loss(found[count:] + 1e-6)

    def _solve(
        self, objective: np.ndarray, matrix: Any, low: np.ndarray, high: np.ndarray, slacks: int = 0
    ) -> np.ndarray:
        from scipy.optimize import Bounds, LinearConstraint, milp

        one = np.ones(len(self.groups))
        binary = np.append(np.ones(len(self.losses)), np.zeros(slacks))
        with stdout_aside():  # HiGHS prints notes to itself there
            result = milp(
                objective,
                constraints=LinearConstraint(matrix, np.append(one, low), np.append(one, high)),
                integrality=binary,
                bounds=Bounds(0, np.where(binary > 0, 1.0, np.inf)),
                options={"time_limit": TIME_LIMIT, "mip_rel_gap": self.gap},
            )
        if result.x is None:
            if result.status == 2:
                raise Infeasible
            raise Failed(f"the integer program found no plan: {result.message}")
        found: np.ndarray = result.x
        return found

    def _chosen(self, values: np.ndarray) -> list[int]:
        chosen = np.split(values[: len(self.losses)], np.cumsum(self.counts)[:-1])
        return [int(np.argmax(part)) for part in chosen]
