"""What fewer tokens cost the scenario's own text that nothing was counted from.

A new paper brings words that none of the counted ones has. So the scenario's documents are dealt into folds, the pieces
of one original together, and each fold pays for the order in which the tokens would go by the rest of the text.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cusprun.vocabulary.usage import Usage, count_tokens

FOLDS = 8


def deal(own: Mapping[str, str]) -> dict[str, int]:
    """The fold of each text of ``own``, which names the original that it is a part of.

    Where there are fewer originals than FOLDS the texts are dealt one by one; empty where these are too few as well.
    """
    if len(own) < FOLDS:
        return {}
    apart = len(set(own.values())) < FOLDS
    return {text: zlib.crc32((text if apart else original).encode("utf-8", "replace")) % FOLDS
            for text, original in own.items()}  # fmt: skip


def price_new_text(
    texts: Mapping[str, Sequence[str]],
    usages: Mapping[str, Usage],
    own: Mapping[str, str],
    tokenizer: Any,
    order_by: Callable[[Mapping[str, Usage]], np.ndarray],
    cost: Callable[[Usage], np.ndarray],
) -> np.ndarray:
    """Extra nats per byte of new text of the scenario after so many rows, (removable + 1,) float64.

    One zero where there is too little of it to tell.

    ``usages`` count ``texts`` by corpus; ``order_by`` gives the order of removal by such counts, ``cost`` the nats that
    each token's absence adds to what a usage counts, (rows,).
    """
    folds = deal(own)
    rows = next(iter(usages.values())).counts.shape[0]
    curves, n_bytes = [], 0
    for fold in sorted(set(folds.values())):
        left_out = {text for text, number in folds.items() if number == fold}
        rest = {
            name: usage - count_tokens((text for text in texts[name] if text in left_out), tokenizer, rows)
            for name, usage in usages.items()
        }
        if not all(usage.tokens for usage in rest.values()):
            continue  # a corpus of this fold alone
        new = count_tokens(left_out, tokenizer, rows)
        curves.append(np.concatenate([[0.0], np.cumsum(cost(new)[order_by(rest)])]))
        n_bytes += new.n_bytes
    if not n_bytes:
        return np.zeros(1)
    length = max(map(len, curves))
    summed: np.ndarray = np.sum([np.pad(curve, (0, length - len(curve)), mode="edge") for curve in curves], axis=0)
    return summed / n_bytes
