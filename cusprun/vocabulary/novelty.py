"""What fewer tokens cost the scenario's own text that nothing was counted from.

A new paper brings words that none of the counted ones has. So the scenario's documents are dealt into folds, the pieces
of one original together, and each fold pays for the order in which the tokens would go by the rest of the text, from
which everything of the fold's originals is left out. What the model gave the tokens to expect, and what splits cost,
was measured on windows of all the text: where that is little, the price of what is new is too low.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cusprun.progress import track
from cusprun.vocabulary.usage import Usage, count_tokens

FOLDS = 8


@dataclass(frozen=True)
class NewText:
    """``curve`` (removable + 1,) float64: extra nats per byte of new text of the scenario after so many rows."""

    curve: np.ndarray
    tokens: int  # of the text that paid, as the dense tokenizer has it
    n_bytes: int
    folds: int


def deal(own: Collection[str], originals: Mapping[str, str]) -> dict[str, int]:
    """The fold of each original of ``own``: the largest first, each to the fold that has the least text.

    ``originals`` name what each text is a piece of. Where all are pieces of one they are dealt as originals of their
    own. Empty where there are not two.
    """
    sizes: dict[str, int] = {}
    for text in own:
        sizes[originals[text]] = sizes.get(originals[text], 0) + len(text)
    if len(sizes) < 2:
        sizes = {text: len(text) for text in own}
    if len(sizes) < 2:
        return {}
    folds, given = {}, [0] * min(FOLDS, len(sizes))
    for name, size in sorted(
        sizes.items(), key=lambda each: (-each[1], zlib.crc32(each[0].encode("utf-8", "replace")))
    ):
        fold = given.index(min(given))
        folds[name] = fold
        given[fold] += size
    return folds


def price_new_text(
    texts: Mapping[str, Sequence[str]],
    usages: Mapping[str, Usage],
    own: Collection[str],
    originals: Mapping[str, str],
    tokenizer: Any,
    order_by: Callable[[Mapping[str, Usage], Callable[[str], bool]], np.ndarray | None],
    cost: Callable[[Usage], np.ndarray],
) -> NewText | None:
    """Each fold of ``own`` pays for the order by the rest; None where there is too little of it to tell.

    ``usages`` count ``texts`` by corpus; ``order_by`` gives the order of removal by such counts and without the texts
    that its function tells to leave out, None where they are all there is; ``cost`` the nats that each token's absence
    adds to what a usage counts, (rows,).
    """
    folds = deal(own, originals)
    rows = next(iter(usages.values())).counts.shape[0]

    def is_in(fold: int, text: str) -> bool:
        return folds.get(originals[text], folds.get(text)) == fold

    curves, tokens, n_bytes = [], 0, 0
    for fold in track(sorted(set(folds.values())), "what new text costs, fold by fold"):
        left_out = partial(is_in, fold)
        rest = {
            name: usage - count_tokens(filter(left_out, texts[name]), tokenizer, rows) for name, usage in usages.items()
        }
        if not all(usage.tokens for usage in rest.values()):
            continue  # a corpus of this fold alone
        order = order_by(rest, left_out)
        if order is None:
            continue
        new = count_tokens(filter(left_out, own), tokenizer, rows)
        curves.append(np.concatenate([[0.0], np.cumsum(cost(new)[order])]))
        tokens, n_bytes = tokens + new.tokens, n_bytes + new.n_bytes
    if not n_bytes:
        return None
    return NewText(np.sum(curves, axis=0) / n_bytes, tokens, n_bytes, len(curves))
