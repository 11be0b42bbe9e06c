"""What fewer tokens cost text of the scenario that was not counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cusprun.checkpoint import load_tokenizer
from cusprun.vocabulary import count_tokens, expected_rates, order_removals, price_vocabulary, read_pieces
from cusprun.vocabulary.novelty import FOLDS, deal, price_new_text
from tests.pico import SENTENCES
from tests.vocabulary.tokenizers_made import DECLARATION, make


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


def test_pieces_of_one_original_share_a_fold() -> None:
    papers = {f"{paper}, section {number}": f"paper {paper}" for paper in range(40) for number in range(5)}
    folds = deal(papers)
    assert set(folds.values()) == set(range(FOLDS))
    for paper in range(40):
        assert len({folds[f"{paper}, section {number}"] for number in range(5)}) == 1


def test_pieces_of_few_originals_are_dealt_one_by_one() -> None:
    book = {f"page {number}": "book" for number in range(200)}
    assert set(deal(book).values()) == set(range(FOLDS))
    assert deal({f"page {number}": f"book {number}" for number in range(FOLDS - 1)}) == {}


def test_every_fold_pays_for_the_order_of_the_rest(dense: Path) -> None:
    pieces, tokenizer = read_pieces(dense), load_tokenizer(dense)
    own = {f"{SENTENCES[number % 3]} {number}": f"original {number}" for number in range(24)}
    texts = {"scenario": list(own), "language": [DECLARATION["en"]]}
    weights = {"scenario": 1.0, "language": 1.0}
    usages = {name: count_tokens(documents, tokenizer, pieces.rows) for name, documents in texts.items()}
    nats = np.random.default_rng(0).random(pieces.rows)

    def order_by(rest: dict) -> np.ndarray:
        return order_removals(pieces, expected_rates(rest, weights) * nats)

    found = price_new_text(texts, usages, own, tokenizer, order_by, lambda usage: usage.occurrences(0.5) * nats)
    folds = deal(own)
    gone, total, n_bytes = len(found) - 1, 0.0, 0
    for fold in set(folds.values()):
        new = [text for text in own if folds[text] == fold]
        kept = [text for text in own if folds[text] != fold]
        order = order_by({
            "scenario": count_tokens(kept, tokenizer, pieces.rows), "language": usages["language"],
        })  # fmt: skip
        for text in new:
            ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
            for identity in order[:gone]:
                times = int((ids == identity).sum())
                total += nats[identity] * (times and 1 + 0.5 * (times - 1))
            n_bytes += len(text.encode())
    assert total > 0
    assert found[gone] == pytest.approx(total / n_bytes)
    assert found[0] == 0
    assert (np.diff(found) >= 0).all()


def test_words_of_one_original_alone_are_dear_to_the_next(dense: Path) -> None:
    """Languages that one original each is written in: new text of them has words that the rest never showed."""
    words = [word for language in DECLARATION for word in DECLARATION[language].split()]
    assert len(words) > 80
    own = {f"{' '.join(words[start : start + 10])} " * 12: f"original {start}" for start in range(0, 80, 10)}
    same = {f"{' '.join(words)} {'.' * number}": f"original {number}" for number in range(8)}
    weights = {"scenario": 1.0}
    for texts, dear in ((own, True), (same, False)):
        prices = price_vocabulary(dense, {"scenario": list(texts)}, weights, own=texts, tokens=1500)
        assert len(prices.own) == len(prices.curve)
        half = len(prices.order) // 2
        assert (prices.own[half] > prices.curve[half]) is np.bool_(dear)
        assert (prices.cost == np.maximum(prices.own, prices.curve)).all()


def test_too_little_own_text_tells_nothing(dense: Path) -> None:
    texts = {"scenario": [DECLARATION["en"] * 20]}
    prices = price_vocabulary(dense, texts, {"scenario": 1.0}, own={"a": "b"}, tokens=1500)
    assert not prices.own.any()
    assert (prices.cost == prices.curve).all()
