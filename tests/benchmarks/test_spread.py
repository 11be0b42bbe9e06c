"""Intervals hold what they say, on runs that are independent and on runs that drift."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cusprun.benchmarks.pace import LEAST_ROUNDS, Pace, errors_of
from cusprun.benchmarks.spread import Ratio, Spread

TRIALS = 1000


def drifting(rng: np.random.Generator, rounds: int, kept: float, sd: float = 4.0) -> np.ndarray:
    """Tokens per second around 100 whose errors hang together: of each ``kept`` goes on into the next round."""
    errors = rng.normal(size=rounds + 50)
    for index in range(1, len(errors)):
        errors[index] = kept * errors[index - 1] + math.sqrt(1 - kept**2) * errors[index]
    return 100 + sd * errors[50:]


def test_few_independent_runs_give_student_s_interval() -> None:
    values = [10.0, 12.0, 11.0, 13.0, 9.0]
    found = Spread.of(values)
    error = stats.sem(values)
    assert (found.mean, found.sd, found.n, found.median) == (11.0, pytest.approx(np.std(values, ddof=1)), 5, 11.0)
    assert found.stderr == pytest.approx(error)
    assert found.ci95 == pytest.approx(stats.t.interval(0.95, 4, 11.0, error))
    assert found.again95 == pytest.approx(stats.t.interval(0.95, 4, 11.0, error * math.sqrt(2)))
    assert found.relative_error == pytest.approx(error / 11)


def test_one_run_claims_nothing() -> None:
    found = Spread.of([3.0])
    assert found == Spread(3.0, 0.0, 1, 3.0)
    assert found.relative_error == math.inf
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, pytest.approx(1.5), 1, None, None)


def test_slow_drift_widens_the_interval() -> None:
    steady, drifted = (
        [100.0 + (-1) ** index for index in range(12)],
        [100.0 + (-1) ** (index // 6) for index in range(12)],
    )
    assert np.std(steady) == np.std(drifted)
    assert Spread.of(drifted).stderr > 1.3 * stats.sem(drifted)
    assert Spread.of(steady).stderr == pytest.approx(stats.sem(steady))


@pytest.mark.parametrize(("kept", "least"), [(0.0, 0.94), (0.3, 0.90)])
def test_means_lie_where_they_are_said_to(kept: float, least: float) -> None:
    rng = np.random.default_rng(1)
    held = again = 0
    for _ in range(TRIALS):
        first, second = (Spread.of(drifting(rng, 16, kept).tolist()) for _ in range(2))
        held += first.ci95[0] <= 100 <= first.ci95[1]
        again += first.again95[0] <= second.mean <= first.again95[1]
    assert held / TRIALS >= least
    assert again / TRIALS >= least


def test_a_slowdown_is_found_under_drift_that_both_share() -> None:
    """Rounds that wander by 8 %, two runs of a round that differ by 2 %: 5 % are found, nothing is found in nothing."""
    rng = np.random.default_rng(2)
    found = alarms = 0
    for _ in range(TRIALS):
        machine = drifting(rng, 12, 0.8, sd=8.0)
        one, other = (machine * np.exp(rng.normal(scale=0.02, size=12)) for _ in range(2))
        slowed, same = Ratio.of((one / 1.05).tolist(), other.tolist()), Ratio.of(one.tolist(), other.tolist())
        found += slowed.ci95[1] < 1
        alarms += not same.ci95[0] <= 1 <= same.ci95[1]
    assert found / TRIALS >= 0.95
    assert alarms / TRIALS <= 0.06


def test_stopping_at_a_small_error_keeps_the_interval_honest() -> None:
    """Rounds are added until the error is below 2 %; the interval at that moment still holds the truth."""
    rng = np.random.default_rng(3)
    pace, held = Pace(None, until=0.02), 0
    for _ in range(TRIALS // 2):
        values = drifting(rng, 200, 0.0, sd=8.0).tolist()
        rounds = next(n for n in range(2, 200) if pace.stop(n, 0.0, errors_of([Spread.of(values[:n])])))
        assert rounds >= LEAST_ROUNDS
        low, high = Spread.of(values[:rounds]).ci95
        held += low <= 100 <= high
    assert held / (TRIALS // 2) >= 0.92


def test_rounds_end_by_number_error_or_time() -> None:
    noisy, quiet = errors_of([Spread.of([90.0, 110.0] * 5)]), errors_of([Spread.of([99.0, 101.0] * 5)])
    assert Pace(3).stop(2, 1e9, noisy) is None
    assert "3 rounds" in Pace(3).stop(3, 0.0, noisy)
    pace = Pace(None, until=0.02, max_seconds=60, paired=True)
    assert pace.stop(10, 30, quiet + noisy) is None  # the worst test counts
    assert "below 2.0%" in pace.stop(10, 30, quiet + quiet)
    assert pace.stop(11, 30, quiet) is None  # an odd round more would favour one order
    assert pace.stop(LEAST_ROUNDS - 2, 30, quiet) is None
    assert "time limit" in pace.stop(3, 60, noisy)
    assert pace.left_s(10, 30, noisy) == pytest.approx(30)  # (3.5/2)² × 10 rounds are more than the limit holds
    assert pace.left_s(5, 10, quiet) == pytest.approx(10)
    assert Pace(4).left_s(0.25, 10, []) == pytest.approx(150)  # within the first round, a quarter of which is done
    assert Pace(None, until=0.02).left_s(1.5, 30, [math.inf]) == pytest.approx((LEAST_ROUNDS - 1.5) * 20)


def test_ratios_have_to_be_known_twice_as_well() -> None:
    one, other = [100.0, 104.0] * 5, [104.0, 100.0] * 5
    tests, ratio = [Spread.of(one), Spread.of(other)], Ratio.of(one, other)
    assert 0.01 < ratio.stderr < 0.02
    assert max(errors_of(tests)) < 0.02 < max(errors_of(tests, [ratio])) == 2 * ratio.stderr
    assert errors_of([], [Ratio.of([1.0], [2.0])]) == [math.inf]
