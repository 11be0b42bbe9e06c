"""How often each token is to be expected in a text: counts over much of it, and what the model expects to follow.

Counting costs tokenizing alone, so it is done over all the text there is. A token that was not seen still has an
expected count: the dense model's probability of it, averaged over the positions of a sample. On English text that
entered neither, the two together at equal weight miss fewer tokens than either alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

BATCH = 64  # texts tokenized at a time
MODEL_SHARE = 0.5  # of the expected rate that is the model's
STRETCH = 512  # tokens within which a token that comes again is told apart from the first of its kind


@dataclass(frozen=True)
class Usage:
    """Tokens of a text over ``n_bytes`` of UTF-8: ``counts`` (rows,) int64, and ``firsts``, those of them that are the
    first of their kind within STRETCH tokens.
    """

    counts: np.ndarray
    firsts: np.ndarray
    n_bytes: int

    def __sub__(self, part: Usage) -> Usage:
        """What is left without a part of the texts."""
        return Usage(self.counts - part.counts, self.firsts - part.firsts, self.n_bytes - part.n_bytes)

    def occurrences(self, again: float) -> np.ndarray:
        """(rows,) float64; one that is not the first within STRETCH tokens counts ``again``."""
        return self.firsts + again * (self.counts - self.firsts)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


def count_tokens(texts: Iterable[str], tokenizer: Any, rows: int) -> Usage:
    """Counts of each token id below ``rows``; ``tokenizer`` is transformers' fast tokenizer.

    Nothing is added in front or behind; the texts of special tokens count as these.
    """
    counts, firsts = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    n_bytes = 0
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        n_bytes += sum(len(text.encode("utf-8", "replace")) for text in batch)
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=np.int64)
            for start in range(0, len(ids), STRETCH):
                found, times = np.unique(ids[start : start + STRETCH], return_counts=True)
                counts[found] += times
                firsts[found] += 1
    return Usage(counts, firsts, n_bytes)


def expected_rates(
    usages: Mapping[str, Usage],
    weights: Mapping[str, float],
    probability: Mapping[str, np.ndarray] | None = None,
    again: float = 1.0,
) -> np.ndarray:
    """Expected occurrences of each token in a byte of text, (rows,) float64, corpora mixed by ``weights``.

    ``probability`` gives the model's mean probability of each token at a position, (rows,), by corpus; ``again`` is
    what an occurrence counts that is not the first within STRETCH tokens.
    """
    total = sum(weights.values())
    rates = np.zeros(next(iter(usages.values())).counts.shape[0])
    for name, usage in usages.items():
        seen = usage.occurrences(again) / max(usage.n_bytes, 1)
        if probability is not None:
            seen = (1 - MODEL_SHARE) * seen + MODEL_SHARE * probability[name] * (usage.tokens / max(usage.n_bytes, 1))
        rates += weights[name] / total * seen
    return rates
