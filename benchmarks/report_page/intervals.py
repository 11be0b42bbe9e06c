"""95 % intervals of what was measured a few times, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cusprun.benchmarks.spread import Ratio

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


def decode_ratio(speed: Mapping[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """Decoding over the dense model's and its interval, None for fewer than three rounds: as the report holds them.

    Records of old hold neither mean nor interval of the pairs; there both come from the runs, and from those whose runs
    were not kept there is the median alone.
    """
    kept = speed["ratios"]["decode_tps"]
    if kept.get("of_pairs") is not None and kept.get("pairs") is not None:
        interval = kept.get("ci95") if kept["pairs"] >= FEWEST else None
        return kept["of_pairs"], None if interval is None else (interval[0], interval[1])
    one, other = (speed[who].get("samples", {}).get("decode_tps", []) for who in ("expert", "dense"))
    found = ratio_interval(one, other)
    return (kept["median_of_pairs"], None) if found is None else (Ratio.of(one, other).of_pairs, found)


def ratio_interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """Of the geometric mean of the ratios of two artifacts run in alternation, by the rule of decision 015.

    None for fewer than three rounds, for lists of different lengths, and where a value is not above 0.
    """
    if len(one) != len(other) or len(one) < FEWEST or not all(value > 0 for value in (*one, *other)):
        return None
    return Ratio.of(one, other).ci95


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
