"""95 % intervals of what was measured a few times, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence

FEWEST = 3  # runs: two give an interval twelve times as wide as their distance


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean of ``values``; None for fewer than three."""
    if len(values) < FEWEST:
        return None
    from scipy.stats import t

    n, mean = len(values), math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    reach = float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return mean - reach, mean + reach


def ratio_interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """Of the ratio of two artifacts run in alternation: from the logarithms of each round's ratio.

    None for fewer than three rounds, for lists of different lengths, and where a value is not above 0.
    """
    if len(one) != len(other) or not all(value > 0 for value in (*one, *other)):
        return None
    found = mean_interval([math.log(a / b) for a, b in zip(one, other, strict=True)])
    return None if found is None else (math.exp(found[0]), math.exp(found[1]))


def bits_interval(quality: dict[str, float]) -> tuple[float, float] | None:
    """Of bits per byte, from a Quality's standard error of the mean loss; tokens taken as independent.

    ``perplexity_stderr`` is perplexity × that error; bits per byte are in proportion to the mean loss, ln perplexity.
    """
    loss = math.log(quality["perplexity"]) if quality["perplexity"] > 1 else 0.0
    if loss == 0.0:
        return None
    reach = 1.959963984540054 * quality["perplexity_stderr"] / quality["perplexity"] / loss
    bits = quality["bits_per_byte"]
    return max(0.0, bits * (1 - reach)), bits * (1 + reach)
