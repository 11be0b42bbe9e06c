"""How sure a score is, and a difference between two artifacts that were asked the same: the bootstrap over items.

Percentile intervals (Efron 1979); paired: both artifacts are scored on the same resampled items, and the p-value is the
share of resampled differences as far from their mean as the measured one is from 0 (Koehn 2004, Riezler and Maxwell
2005, as sacrebleu's paired bootstrap). Right and wrong answers are compared by McNemar's exact test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cusprun.benchmarks.answer_metrics import Measure
from cusprun.benchmarks.tasks import paired

ROUNDS = 1000
SEED = 0
FEWEST = 10  # items whose resampled differences a p-value can be taken of: of two equal ones it would be 0


@dataclass(frozen=True)
class Figure:
    """A score of all items and its 95 % interval, None where nothing tells it, as of a single item."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """One artifact's score minus the other's on the same items."""

    value: float
    interval: tuple[float, float] | None
    p_value: float | None  # two-sided
    test: str


def figure(measure: Measure, n: int) -> Figure:
    """The score of all ``n`` items and the 2.5th and 97.5th percentile of resampled items' scores."""
    return Figure(_whole(measure, n), _percentiles(_resampled(measure, n)) if n > 1 else None)


def difference(first: Measure, second: Measure, n: int) -> Difference:
    """The first's score minus the second's."""
    value = _whole(first, n) - _whole(second, n)
    if n < 2:
        return Difference(value, None, None, "none for a single item")
    drawn = _resampled(first, n) - _resampled(second, n)
    p_value: float | None
    if first.right is not None and second.right is not None:
        p_value, test = paired(first.right, second.right).p_value, "McNemar, exact"
    elif n < FEWEST:
        p_value, test = None, f"none for fewer than {FEWEST} items"
    else:
        beyond = int((np.abs(drawn - drawn.mean()) >= abs(value) - 1e-12).sum())
        p_value, test = (1 + beyond) / (1 + ROUNDS), f"paired bootstrap, {ROUNDS} rounds"
    return Difference(value, _percentiles(drawn), p_value, test)


def _whole(measure: Measure, n: int) -> float:
    return measure.of(np.arange(n))


def _resampled(measure: Measure, n: int) -> np.ndarray:
    """Scores of ``ROUNDS`` draws of n items with replacement, (ROUNDS,); the same draws for every measure."""
    rng = np.random.default_rng(SEED)
    return np.array([measure.of(rng.integers(0, n, n)) for _ in range(ROUNDS)])


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
