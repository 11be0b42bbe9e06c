"""The price of every token: expected occurrences in a byte of text times the nats that its absence adds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.checkpoint import load_tokenizer
from cusprun.errors import InvalidRequest
from cusprun.files import written_whole
from cusprun.vocabulary.merges import order_removals
from cusprun.vocabulary.pieces import Pieces, read_pieces
from cusprun.vocabulary.splits import SAMPLE, SplitCosts, measure_splits
from cusprun.vocabulary.usage import Usage, count_tokens, expected_rates

MULTIPLE = 64  # row counts that runtimes like
AUTO = 0.002  # of the dense model's loss: what `auto` lets the expected loss grow by


@dataclass(frozen=True)
class VocabularyPrices:
    """In which order tokens go and what it costs.

    ``order`` (removable,) int64: ids, least costly first; what is left of the vocabulary after any number of them is
    closed under merges. ``curve`` (removable + 1,) float64: expected extra nats per byte of text after so many rows.
    """

    rows: int
    order: np.ndarray
    curve: np.ndarray
    dense_nats: float  # the dense model's loss on a byte of the sample
    note: dict[str, Any]

    def rows_for(self, rows: int, multiple: int = MULTIPLE) -> list[int]:
        """Ids that stay, ascending, where ``rows`` are wanted: rounded up to a multiple, no fewer than have to stay.

        Raises InvalidRequest where the model does not have so many.
        """
        if not 0 < rows <= self.rows:
            raise InvalidRequest(f"--vocab {rows}: the model has {self.rows} tokens; write a number up to that")
        rounded = -(-max(rows, self.rows - len(self.order)) // multiple) * multiple
        stays = np.ones(self.rows, dtype=bool)
        stays[self.order[: max(0, self.rows - rounded)]] = False
        kept: list[int] = np.flatnonzero(stays).tolist()
        return kept

    def auto(self, nats: float | None = None, multiple: int = MULTIPLE) -> list[int]:
        """Ids that stay where the expected loss may grow by ``nats`` a byte, by default AUTO of the dense model's."""
        most = AUTO * self.dense_nats if nats is None else nats
        gone = int(np.searchsorted(self.curve, most, side="right")) - 1
        return self.rows_for(self.rows - gone, multiple)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        numbers = {"rows": self.rows, "dense_nats": self.dense_nats, "note": self.note}
        with written_whole(path) as part:
            tensors = {"order": self.order, "curve": self.curve}
            save_file(tensors, part, metadata={"prices": json.dumps(numbers, sort_keys=True)})


def load_prices(path: Path) -> VocabularyPrices:
    """What :meth:`VocabularyPrices.save` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        numbers = json.loads(file.metadata()["prices"])
        return VocabularyPrices(order=file.get_tensor("order"), curve=file.get_tensor("curve"), **numbers)


def price_vocabulary(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    weights: Mapping[str, float],
    *,
    tokens: int = SAMPLE,
    seed: int = 0,
    device: str = "cpu",
) -> VocabularyPrices:
    """Prices of the model in ``folder`` on documents by corpus, rendered as the model reads them.

    All of the text is counted; about ``tokens`` tokens of it go through the model. ``weights`` are the corpora's
    shares of the price. Raises InvalidRequest where the tokenizer is of a kind that cannot be trimmed.
    """
    pieces = read_pieces(folder)
    tokenizer = load_tokenizer(folder)
    usages = {name: count_tokens(documents, tokenizer, pieces.rows) for name, documents in texts.items()}
    counted = expected_rates(usages, weights)
    costs = measure_splits(folder, pieces, texts, counted, tokens=tokens, seed=seed, device=device)
    return set_prices(pieces, usages, weights, costs)


def set_prices(
    pieces: Pieces, usages: Mapping[str, Usage], weights: Mapping[str, float], costs: SplitCosts
) -> VocabularyPrices:
    """The removal order and its curve."""
    rates = expected_rates(usages, weights, costs.probability, costs.again)
    price = rates * costs.nats
    price[[identity for identity, text in enumerate(pieces.texts) if text is None]] = 0
    order = order_removals(pieces, price)
    note = {
        "places": costs.places,
        "mean_nats": costs.mean_nats,
        "again": costs.again,
        "explained": costs.explained,
        "sample_tokens": costs.tokens,
        "weights": dict(weights),
        "corpora": {name: {"tokens": usage.tokens, "bytes": usage.n_bytes} for name, usage in usages.items()},
    }
    curve = np.concatenate([[0.0], np.cumsum(price[order])])
    return VocabularyPrices(pieces.rows, order, curve, costs.dense_nats, note)
