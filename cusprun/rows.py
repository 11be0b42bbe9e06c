"""The vocabulary's part of the budget: the sizes it may have, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cusprun.anatomy import Anatomy
from cusprun.corpora.selection import GENERAL
from cusprun.vocabulary import VocabularyPrices
from cusprun.widths import RowsChoice

GENERAL_IN_PRICE = 1 / 3
STEP = 1024  # rows between the sizes that the integer program may choose
MOST = 0.4  # of what is to be removed, where rows are not weighed against neurons
AUTO_NATS = 0.01  # a token, that the missing rows may add there


def price_weights(shares: Mapping[str, int]) -> dict[str, float]:
    """Weights of the dimensions in a token's price: as in the text, but general text counts GENERAL_IN_PRICE at least.

    A word without its token is lost to every text that has it, and new text has more rare words than what was counted.
    """
    rest = sum(share for name, share in shares.items() if name != GENERAL)
    general = shares.get(GENERAL, 0) / sum(shares.values())
    if general and rest:
        general = max(general, GENERAL_IN_PRICE)
    return {name: general if name == GENERAL else (1 - general) * share / rest for name, share in shares.items()}


def row_choices(
    prices: VocabularyPrices, anatomy: Anatomy, removed_share: float | None, wanted: int | None, weighed: bool
) -> list[RowsChoice]:
    """Sizes of the vocabulary with their cost in nats per token, the whole one first.

    ``wanted`` rows are the one choice where they are given. Rows that are ``weighed`` against neurons may be any
    number; else there is one choice, whose rows add AUTO_NATS or make MOST of ``removed_share``, what comes first.
    """
    if wanted is not None:
        return [RowsChoice(len(prices.rows_for(wanted)), 0.0)]
    cost = prices.cost_of_tokens
    if not weighed:
        gone = int(np.searchsorted(cost, AUTO_NATS, side="right")) - 1
        kept = max(anatomy.vocab_size - gone, _fewest(anatomy, removed_share))
        return [RowsChoice(len(prices.rows_for(kept)), 0.0)]
    choices = [RowsChoice(anatomy.vocab_size, 0.0)]
    for rows in range(anatomy.vocab_size - STEP, 0, -STEP):
        kept = len(prices.rows_for(rows))
        if kept >= choices[-1].rows:
            break
        choices.append(RowsChoice(kept, float(cost[anatomy.vocab_size - kept])))
    return choices


def _fewest(anatomy: Anatomy, removed_share: float | None) -> int:
    """Rows that stay where they make MOST of what goes."""
    if removed_share is None:
        return 1
    row = anatomy.parameters - anatomy.with_vocabulary(anatomy.vocab_size - 1).parameters
    return max(1, anatomy.vocab_size - int(MOST * removed_share * anatomy.parameters / row))
