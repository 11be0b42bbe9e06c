"""How sure an increase is, against drawing the windows again and again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cusprun.benchmarks.tally import percent, ratio_stderr


def test_the_standard_error_is_what_drawing_the_windows_again_shows() -> None:
    chance = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        dense = chance.gamma(20, 30, size=16)  # windows differ far more than what the expert adds
        return dense * (1.1 + 0.03 * chance.standard_normal(16)) + 4 * chance.standard_normal(16), dense

    drawn = [draw() for _ in range(3000)]
    spread = float(np.std([one.sum() / other.sum() for one, other in drawn]))
    said = [ratio_stderr(one.tolist(), other.tolist()) for one, other in drawn]
    assert None not in said
    assert float(np.mean(np.array(said, dtype=float))) == pytest.approx(spread, rel=0.06)
    apart = [ratio_stderr(one.tolist(), other.tolist()) for (one, _), (_, other) in itertools.pairwise(drawn)]
    assert float(np.mean(np.array(apart, dtype=float))) > 5 * spread  # not paired


def test_one_window_tells_nothing_and_equal_shares_are_sure() -> None:
    assert ratio_stderr([3.0], [2.0]) is None
    assert ratio_stderr([], []) is None
    assert ratio_stderr([3.0, 6.0], [2.0, 4.0]) == pytest.approx(0)
    assert ratio_stderr([3.0, 5.0], [2.0, 4.0]) == pytest.approx(np.sqrt(2 * 2 * (1 / 3) ** 2) / 6)


def test_percent() -> None:
    assert [percent(x) for x in (0.0213, 0.0051, -0.2, 0.00996)] == ["+2.1 %", "+0.51 %", "-20.0 %", "+1.0 %"]
    assert percent(0.0932, 0.0117) == "+9.3 ± 1.2 %"
    assert percent(0.0051, 0.0011) == "+0.51 ± 0.11 %"
    assert percent(None) == ""
