"""What fewer tokens cost text of the scenario that was not counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from cusprun.checkpoint import load_tokenizer
from cusprun.vocabulary import (
    Usage,
    count_tokens,
    expected_rates,
    measure_splits,
    order_removals,
    price_vocabulary,
    read_pieces,
)
from cusprun.vocabulary.novelty import FOLDS, deal, price_new_text
from tests.vocabulary.tokenizers_made import DECLARATION, make


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


def test_folds_hold_whole_originals_and_as_much_text_each() -> None:
    papers = {
        f"{paper}, section {number} " * (1 + paper % 7): f"paper {paper}" for paper in range(40) for number in range(5)
    }
    folds = deal(papers, papers)
    assert set(folds) == set(papers.values())
    given = Counter()
    for text, paper in papers.items():
        given[folds[paper]] += len(text)
    assert len(given) == FOLDS
    assert max(given.values()) < 1.2 * min(given.values())
    assert deal(reversed(list(papers)), papers) == folds


def test_few_originals_are_a_fold_each_and_one_alone_is_cut() -> None:
    books = {f"page {number}": f"book {number % 3}" for number in range(30)}
    assert sorted(deal(books, books).values()) == [0, 1, 2]
    book = dict.fromkeys(books, "book")
    assert set(deal(book, book)) == set(book)
    assert set(deal(book, book).values()) == set(range(FOLDS))
    assert deal(["page"], {"page": "book"}) == {}
    assert deal([], {}) == {}


def test_every_fold_pays_for_the_order_of_what_is_left_without_its_originals(dense: Path) -> None:
    """Another corpus holds a summary of each original: it is left out with it."""
    pieces, tokenizer = read_pieces(dense), load_tokenizer(dense)
    words = [word for language in DECLARATION for word in DECLARATION[language].split()]
    own = [" ".join(words[start : start + 5]) for start in range(0, 5 * 24, 5)]
    summaries = [" ".join(text.split()[::2]) for text in own]
    texts = {"scenario": own, "task": summaries, "language": [DECLARATION["en"]]}
    originals = {text: f"original {number // 3}" for each in (own, summaries) for number, text in enumerate(each)}
    originals[DECLARATION["en"]] = "declaration"
    usages = {name: count_tokens(documents, tokenizer, pieces.rows) for name, documents in texts.items()}
    nats = 0.5 + np.random.default_rng(0).random(pieces.rows)

    def order_of(counted: Mapping[str, Usage]) -> np.ndarray:
        return order_removals(pieces, expected_rates(counted, dict.fromkeys(texts, 1.0)) * nats)

    left_out = []

    def order_by(counted: Mapping[str, Usage], is_left_out: Callable[[str], bool]) -> np.ndarray:
        left_out.append({text for text in originals if is_left_out(text)})
        return order_of(counted)

    def occurrences(documents: list[str]) -> np.ndarray:
        return count_tokens(documents, tokenizer, pieces.rows).occurrences(0.5) * nats

    found = price_new_text(
        texts, usages, own, originals, tokenizer, order_by, lambda usage: usage.occurrences(0.5) * nats
    )
    assert found is not None
    assert found.folds == FOLDS
    assert found.n_bytes == sum(len(text.encode()) for text in own)
    expected, leaking, seen = (np.zeros(len(found.curve)) for _ in range(3))
    for name in set(originals.values()) - {"declaration"}:
        new = occurrences([text for text in own if originals[text] == name])
        without = {
            corpus: [text for text in documents if originals[text] != name] for corpus, documents in texts.items()
        }
        for total, left in ((expected, without), (leaking, {**without, "task": summaries}), (seen, texts)):
            counted = {corpus: count_tokens(each, tokenizer, pieces.rows) for corpus, each in left.items()}
            total[1:] += np.cumsum(new[order_of(counted)])
    assert sorted(map(sorted, left_out)) == sorted(
        sorted(text for text in originals if originals[text] == name)
        for name in set(originals.values()) - {"declaration"}
    )
    assert found.curve == pytest.approx(expected / found.n_bytes)
    places = [len(expected) // 2, len(expected) * 3 // 4]
    assert (expected[places] > 1.05 * leaking[places]).all()
    assert (leaking[places] > 1.05 * seen[places]).all()


def test_the_splits_of_a_fold_are_not_known_to_the_order_it_pays_for(dense: Path) -> None:
    """What a build asks, put together by hand: once from the other originals' splits alone, once from all of them."""
    pieces, tokenizer = read_pieces(dense), load_tokenizer(dense)
    words = [word for language in DECLARATION for word in DECLARATION[language].split()]
    own = [f"{' '.join(words[start : start + 10])} " * 12 for start in range(0, 80, 10)]
    weights = {"scenario": 1.0}
    usages = {"scenario": count_tokens(own, tokenizer, pieces.rows)}
    rates = expected_rates(usages, weights)
    splits = measure_splits(dense, pieces, {"scenario": own}, rates, tokens=1500)
    everything = splits.costs(rates)
    assert everything is not None
    curves = []
    for leave_out in (True, False):
        total = np.zeros(1)
        for text in own:
            rest = {"scenario": count_tokens([each for each in own if each != text], tokenizer, pieces.rows)}
            rest_rates = expected_rates(rest, weights)
            known = splits.costs(rest_rates, text.__eq__ if leave_out else None)
            assert known is not None
            price = expected_rates(rest, weights, known.probability, known.again) * known.nats
            price[[each is None for each in pieces.texts]] = 0
            new = count_tokens([text], tokenizer, pieces.rows).occurrences(everything.again) * everything.nats
            total = total + np.concatenate([[0.0], np.cumsum(new[order_removals(pieces, price)])])
        curves.append(total / sum(len(text.encode()) for text in own))
    found = price_vocabulary(dense, {"scenario": own}, weights, own=own, tokens=1500).new_text
    assert found == pytest.approx(curves[0])
    assert found != pytest.approx(curves[1])


def test_a_fold_that_is_all_there_is_pays_nothing(dense: Path) -> None:
    pieces, tokenizer = read_pieces(dense), load_tokenizer(dense)
    own = [DECLARATION[language] for language in DECLARATION]
    usages = {"scenario": count_tokens(own, tokenizer, pieces.rows)}
    found = price_new_text(
        {"scenario": own},
        usages,
        own,
        {text: text for text in own},
        tokenizer,
        lambda *_: None,
        lambda usage: usage.counts,
    )
    assert found is None


def test_words_of_one_original_alone_are_dear_to_the_next(dense: Path) -> None:
    """Languages that one original each is written in: new text of them has words that the rest never showed."""
    words = [word for language in DECLARATION for word in DECLARATION[language].split()]
    own = [f"{' '.join(words[start : start + 10])} " * 12 for start in range(0, 80, 10)]
    same = [f"{' '.join(words)} {'.' * number}" for number in range(8)]
    for texts, dear in ((own, True), (same, False)):
        prices = price_vocabulary(dense, {"scenario": texts}, {"scenario": 1.0}, own=texts, tokens=1500)
        assert len(prices.new_text) == len(prices.curve)
        half = len(prices.order) // 2
        assert (prices.new_text[half] > prices.curve[half]) is np.bool_(dear)
        counted = prices.note["new_text"]
        assert counted["bytes"] == sum(len(text.encode()) for text in texts)
        ratio = counted["bytes"] / counted["tokens"]
        assert (prices.cost_of_tokens == pytest.approx(np.maximum(prices.new_text, prices.curve) * ratio)) is True


def test_too_little_own_text_tells_nothing(dense: Path) -> None:
    texts = {"scenario": [DECLARATION["en"] * 20]}
    prices = price_vocabulary(dense, texts, {"scenario": 1.0}, own=texts["scenario"], tokens=1500)
    assert not prices.new_text.any()
    assert prices.note["new_text"] is None
    counted = prices.note["corpora"]["scenario"]
    assert prices.cost_of_tokens == pytest.approx(prices.curve * counted["bytes"] / counted["tokens"])
