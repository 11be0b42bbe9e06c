"""The integer program that spends a budget: one choice for every layer and one for the vocabulary, least loss in sum.

Each group (a layer, the vocabulary) offers choices with a measured loss and a price; exactly one of each is taken, so
that what is removed lies within the tolerance of the target and the losses add up to the least. HiGHS solves it
through SciPy. That losses of single groups add up is the one assumption; the caller bounds how far it is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cusprun.errors import Failed, InvalidRequest

TIME_LIMIT = 60.0  # seconds; the gap is closed long before on every model tried
GAP = 1e-4


@dataclass(frozen=True)
class Choice:
    """One way to cut a group."""

    loss: float  # nats that it adds, at least 0
    removed: float  # what it takes off the budget: parameters, bytes or seconds


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


def solve(groups: Sequence[Sequence[Choice]], target: float, tolerance: float) -> list[int]:
    """The choice of every group, by number: least total loss with the removals adding up to the target ± tolerance.

    Raises InvalidRequest naming the nearest sums that can be had where none lies within the tolerance.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, vstack

    counts = [len(group) for group in groups]
    flat = [choice for group in groups for choice in group]
    losses = np.array([choice.loss for choice in flat])
    removed = np.array([choice.removed for choice in flat])
    scale = max(abs(target), 1.0)
    rows = np.repeat(np.arange(len(groups)), counts)
    one_each = csr_matrix((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(groups), len(flat)))
    matrix = vstack([one_each, csr_matrix(removed / scale)])
    low = np.append(np.ones(len(groups)), (target - tolerance) / scale)
    high = np.append(np.ones(len(groups)), (target + tolerance) / scale)
    result = milp(
        losses,
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": GAP},
    )
    if result.x is None:
        if result.status == 2:
            least = sum(min(choice.removed for choice in group) for group in groups)
            most = sum(max(choice.removed for choice in group) for group in groups)
            raise InvalidRequest(
                f"no choice of widths removes {target:,.0f} ± {tolerance:,.0f}; they remove {least:,.0f} to {most:,.0f}"
            )
        raise Failed(f"the integer program found no plan: {result.message}")
    chosen = np.split(result.x, np.cumsum(counts)[:-1])
    return [int(np.argmax(part)) for part in chosen]
