"""The price of every token: expected occurrences in a byte of text times the nats that its absence adds.

What is counted is what the dimensions' text takes on the mean; where new text of the scenario itself would take more,
that is what a smaller vocabulary costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.checkpoint import load_tokenizer
from cusprun.errors import InvalidRequest
from cusprun.files import written_whole
from cusprun.vocabulary.merges import order_removals
from cusprun.vocabulary.novelty import price_new_text
from cusprun.vocabulary.pieces import Pieces, read_pieces
from cusprun.vocabulary.splits import SAMPLE, SplitCosts, measure_splits
from cusprun.vocabulary.usage import Usage, count_tokens, expected_rates

MULTIPLE = 64  # row counts that runtimes like


@dataclass(frozen=True)
class VocabularyPrices:
    """In which order tokens go and what it costs.

    ``order`` (removable,) int64: ids, least costly first; what is left of the vocabulary after any number of them is
    closed under merges. ``curve`` (removable + 1,) float64: expected extra nats per byte of text after so many rows;
    ``new_text`` likewise: of new text of the scenario itself, zeros where none was told apart.
    """

    rows: int
    order: np.ndarray
    curve: np.ndarray
    dense_nats: float  # the dense model's loss on a byte of the sample
    note: dict[str, Any]
    new_text: np.ndarray

    @property
    def cost_of_tokens(self) -> np.ndarray:
        """Extra nats per token of the dearer of ``curve`` and ``new_text`` after so many rows, (removable + 1,).

        Each in its own text's bytes per token of the dense tokenizer.
        """
        weights, corpora = self.note["weights"], self.note["corpora"]
        mean = sum(weights[name] * each["bytes"] / each["tokens"] for name, each in corpora.items()) / sum(
            weights[name] for name in corpora
        )
        new = self.note["new_text"]
        return np.maximum(self.curve * mean, self.new_text * (new["bytes"] / new["tokens"] if new else 0.0))

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

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        numbers = {"rows": self.rows, "dense_nats": self.dense_nats, "note": self.note}
        with written_whole(path) as part:
            tensors = {"order": self.order, "curve": self.curve, "new_text": self.new_text}
            save_file(tensors, part, metadata={"prices": json.dumps(numbers, sort_keys=True)})


def load_prices(path: Path) -> VocabularyPrices:
    """What :meth:`VocabularyPrices.save` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        numbers = json.loads(file.metadata()["prices"])
        tensors = {name: file.get_tensor(name) for name in ("order", "curve", "new_text")}
        return VocabularyPrices(**tensors, **numbers)


def price_vocabulary(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    weights: Mapping[str, float],
    *,
    own: Collection[str] = (),
    originals: Mapping[str, str] | None = None,
    tokens: int = SAMPLE,
    seed: int = 0,
    device: str = "cpu",
) -> VocabularyPrices:
    """Prices of the model in ``folder`` on documents by corpus, rendered as the model reads them.

    All of the text is counted; about ``tokens`` tokens of it go through the model. ``weights`` are the corpora's
    shares of the price. ``own`` are those of the texts that are the scenario's own; ``originals`` name what each text
    is a piece of, by default itself. Raises InvalidRequest where the tokenizer is of a kind that cannot be trimmed.
    """
    pieces = read_pieces(folder)
    tokenizer = load_tokenizer(folder)
    usages = {name: count_tokens(documents, tokenizer, pieces.rows) for name, documents in texts.items()}
    counted = expected_rates(usages, weights)
    splits = measure_splits(folder, pieces, texts, counted, tokens=tokens, seed=seed, device=device)
    costs = splits.costs(counted)
    if costs is None:
        raise InvalidRequest("the text is too short to tell what a missing token costs: give more, or --vocab keep")
    prices = set_prices(pieces, usages, weights, costs)

    def order_by(rest: Mapping[str, Usage], left_out: Callable[[str], bool]) -> np.ndarray | None:
        known = splits.costs(expected_rates(rest, weights), left_out)
        return None if known is None else order_removals(pieces, _price(pieces, rest, weights, known))

    new = price_new_text(
        texts, usages, own, originals or {text: text for documents in texts.values() for text in documents}, tokenizer,
        order_by, lambda usage: usage.occurrences(costs.again) * _nats(pieces, costs),
    )  # fmt: skip
    if new is None:
        return prices
    note = {**prices.note, "new_text": {"tokens": new.tokens, "bytes": new.n_bytes, "folds": new.folds}}
    return replace(prices, new_text=new.curve, note=note)


def _nats(pieces: Pieces, costs: SplitCosts) -> np.ndarray:
    """What each token's absence adds, (rows,); rows that are no token cost nothing."""
    return np.where([text is None for text in pieces.texts], 0.0, costs.nats)


def _price(pieces: Pieces, usages: Mapping[str, Usage], weights: Mapping[str, float], costs: SplitCosts) -> np.ndarray:
    return expected_rates(usages, weights, costs.probability, costs.again) * _nats(pieces, costs)


def set_prices(
    pieces: Pieces, usages: Mapping[str, Usage], weights: Mapping[str, float], costs: SplitCosts
) -> VocabularyPrices:
    """The removal order and its curve; no text is told apart as the scenario's own."""
    price = _price(pieces, usages, weights, costs)
    order = order_removals(pieces, price)
    note = {
        "places": costs.places,
        "mean_nats": costs.mean_nats,
        "again": costs.again,
        "explained": costs.explained,
        "sample_tokens": costs.tokens,
        "weights": dict(weights),
        "corpora": {name: {"tokens": usage.tokens, "bytes": usage.n_bytes} for name, usage in usages.items()},
        "new_text": None,
    }
    curve = np.concatenate([[0.0], np.cumsum(price[order])])
    return VocabularyPrices(pieces.rows, order, curve, costs.dense_nats, note, np.zeros_like(curve))
