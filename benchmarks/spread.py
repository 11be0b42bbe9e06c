"""Mean, spread and intervals of repeated runs; what they may claim on a machine that drifts.

Rounds follow one another, so their errors may hang together. The standard error is therefore the largest of those
that means over blocks of 1, 2, 4 ... rounds in a row give (batch means; Law, Simulation Modeling and Analysis, 9.5.3),
as long as LEAST_BLOCKS blocks are left: independent rounds give the usual one, slow drift a larger one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEAST_BLOCKS = 5
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of ``n`` runs; of one run, and in records of old, the rest is None.

    ``again95`` is where the mean of another measurement with as many runs is expected: two means differ by more than
    one errs, by the root of two, and a 95 % interval of a mean holds the next mean in 83 of 100 cases only.
    """

    mean: float
    sd: float
    n: int
    median: float | None = None
    stderr: float | None = None  # of the mean
    ci95: tuple[float, float] | None = None  # Student's, of the mean
    again95: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean, median, n = statistics.fmean(values), statistics.median(values), len(values)
        if n == 1:
            return cls(mean, 0.0, 1, median)
        error, half = _error(values)
        ci, again = (_around(mean, width) for width in (half, half * math.sqrt(2)))
        return cls(mean, statistics.stdev(values), n, median, error, ci, again)

    @property
    def relative_error(self) -> float:
        """Standard error over mean; infinite for a single run, which tells nothing of it."""
        return math.inf if self.stderr is None else abs(self.stderr / self.mean) if self.mean else 0.0


@dataclass(frozen=True)
class Ratio:
    """A figure over that of another artifact, from the two runs of each round."""

    of_means: float
    median_of_pairs: float
    of_pairs: float  # geometric mean
    pairs: int
    stderr: float | None  # of the mean logarithm: a share; None for one pair
    ci95: tuple[float, float] | None  # of ``of_pairs``, Student's on the logarithms; None for one pair

    @classmethod
    def of(cls, values: Sequence[float], others: Sequence[float]) -> Ratio:
        """Raises ValueError unless both have as many runs."""
        pairs = [one / other for one, other in zip(values, others, strict=True)]
        logs = [math.log(pair) for pair in pairs]
        centre, (error, half) = statistics.fmean(logs), _error(logs) if len(logs) > 1 else (None, None)
        return cls(
            statistics.fmean(values) / statistics.fmean(others),
            statistics.median(pairs),
            math.exp(centre),
            len(pairs),
            error,
            None if half is None else (math.exp(centre - half), math.exp(centre + half)),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _around(mean: float, half: float) -> tuple[float, float]:
    """An interval of a figure that is never below 0, as all are here."""
    return max(mean - half, 0.0), mean + half


def _error(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of the mean and half the width of its interval, each the largest over the block sizes."""
    found = [(error, _quantile(blocks - 1) * error) for error, blocks in _errors(values)]
    return max(error for error, _ in found), max(half for _, half in found)


def _errors(values: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Standard error and number of blocks for blocks of 1, 2, 4 ... values; the last values may be left over."""
    size = 1
    while size == 1 or len(values) // size >= LEAST_BLOCKS:
        blocks = len(values) // size
        means = [statistics.fmean(values[at * size : (at + 1) * size]) for at in range(blocks)]
        yield statistics.stdev(means) / math.sqrt(blocks), blocks
        size *= 2


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
