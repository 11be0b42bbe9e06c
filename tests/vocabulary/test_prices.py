"""Counts, expected rates, measured splits and the order in which tokens go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model, load_tokenizer
from cusprun.errors import InvalidRequest
from cusprun.layerwise import LayerwiseModel
from cusprun.vocabulary import (
    SplitCosts,
    Usage,
    close,
    count_tokens,
    expected_rates,
    load_prices,
    measure_splits,
    order_removals,
    price_vocabulary,
    read_pieces,
    set_prices,
    trim_model,
)
from cusprun.vocabulary.splits import WARM, Splits, _compare, _fit, _losses, _padded, _read
from cusprun.vocabulary.usage import STRETCH
from tests.pico import SENTENCES, save_model
from tests.vocabulary.tokenizers_made import DECLARATION, KINDS, make

TEXTS = {"scenario": [" ".join(SENTENCES[:2]) * 20], "language": [f"{DECLARATION['en']} " * 20, SENTENCES[2] * 20]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


def test_counts_are_those_of_the_tokenizer(dense: Path) -> None:
    tokenizer = load_tokenizer(dense)
    texts = [*SENTENCES * 20, "<|im_start|>user\nä<|im_end|>"]
    usage = count_tokens(iter(texts), tokenizer, read_pieces(dense).rows)
    expected, firsts = np.zeros((2, read_pieces(dense).rows), dtype=int)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        np.add.at(expected, ids, 1)
        firsts[list(set(ids))] += 1
    assert (usage.counts == expected).all()
    assert (usage.firsts == firsts).all()
    twice = count_tokens([" a" * STRETCH * 2], tokenizer, read_pieces(dense).rows)
    assert (twice.counts.max(), twice.firsts.max()) == (2 * STRETCH, 2)
    assert usage.n_bytes == sum(len(text.encode()) for text in texts)


def test_expected_rates_mix_corpora_and_the_model() -> None:
    one, other = np.array([1, 0]), np.array([0, 4])
    usages = {"a": Usage(np.array([8, 0]), one, 16), "b": Usage(other, other, 8)}
    assert np.allclose(expected_rates(usages, {"a": 3, "b": 1}), [0.75 * 0.5, 0.25 * 0.5])
    assert np.allclose(expected_rates(usages, {"a": 3, "b": 1}, again=0.5), [0.75 * 4.5 / 16, 0.25 * 0.5])
    probability = {"a": np.array([0.5, 0.5]), "b": np.array([0.0, 1.0])}
    found = expected_rates(usages, {"a": 1, "b": 1}, probability)
    assert np.allclose(found, [0.5 * (0.5 * 0.5 + 0.5 * 0.25), 0.5 * (0.5 * 0.25) + 0.5 * 0.5])
    assert found[0] > 0
    assert found.sum() == pytest.approx(0.5)  # tokens in a byte


@pytest.mark.parametrize("kind", KINDS)
def test_every_beginning_of_the_order_leaves_a_closed_vocabulary(tmp_path: Path, kind: str) -> None:
    pieces = read_pieces(make(tmp_path / "model", kind))
    price = np.random.default_rng(0).exponential(size=pieces.rows) ** 3
    order = order_removals(pieces, price).tolist()
    assert len(set(order)) == len(order) == pieces.rows - len(close(pieces, ()))
    needs = pieces.needs
    assert bool(needs) == (kind != "Unigram")
    place = {identity: number for number, identity in enumerate(order)}
    for product, parts in needs.items():
        for part in parts:
            assert place.get(part, len(order)) > place.get(product, len(order)) or part not in place
    kept = sorted(set(range(pieces.rows)) - set(order[: len(order) // 3]))
    tokenizer, whole = pieces.tokenizer(kept), pieces.tokenizer()

    def spelled(model: Any, text: str) -> list[str]:
        return [token.value for token in model.tokenize(text)]

    texts = [text for identity in kept if (text := pieces.texts[identity]) in pieces.ids]
    reached = [text for text in texts if spelled(whole.model, text) == [text]]
    assert len(reached) > 200
    assert [text for text in reached if spelled(tokenizer.model, text) != [text]] == []


def test_a_cheap_step_waits_for_the_dear_piece_that_needs_it(dense: Path) -> None:
    pieces = read_pieces(dense)
    needs = pieces.needs
    whole = max(needs, key=lambda identity: len(pieces.texts[identity] or ""))
    step = next(part for part in needs[whole] if part in needs)
    price = np.ones(pieces.rows)
    price[step], price[whole] = 0.0, 1e6
    order = order_removals(pieces, price).tolist()
    assert order.index(step) > order.index(whole) > 0.9 * len(order)
    price[whole] = 0.0
    order = order_removals(pieces, price).tolist()
    assert order.index(whole) < 0.1 * len(order)


def test_padding_goes_first(dense: Path) -> None:
    pieces = read_pieces(dense)
    usages = {name: count_tokens(texts, load_tokenizer(dense), pieces.rows) for name, texts in TEXTS.items()}
    flat = {name: np.full(pieces.rows, 1 / pieces.rows) for name in TEXTS}
    costs = SplitCosts(np.ones(pieces.rows), 1.0, flat, 1, 1.0, 0.0, 1.0, 1)
    prices = set_prices(pieces, usages, {"scenario": 1.0, "language": 1.0}, costs)
    padding = {identity for identity, text in enumerate(pieces.texts) if text is None}
    assert len(padding) == 5
    assert set(prices.order[:5].tolist()) == padding
    assert prices.curve[5] == 0 < prices.curve[6]
    assert (np.diff(prices.curve) >= 0).all()


def test_losses_are_those_of_the_model_alone(dense: Path) -> None:
    model = load_model(dense)
    tokenizer = load_tokenizer(dense)
    sequences = [tokenizer(text)["input_ids"] for text in SENTENCES[:2]]
    layers = LayerwiseModel(dense, describe(dense))
    (states,) = _read(layers, [_padded(sequences)])
    with layers.head() as head:
        found, summed = _losses(head, states, sequences, None)
    assert len(sequences[0]) != len(sequences[1])  # one of them is padded
    for ids, nats, probability in zip(sequences, found, summed, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        alone = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        assert np.allclose(nats, alone.numpy(), atol=1e-4)
        assert np.allclose(probability, torch.softmax(logits[WARM:], -1).sum(0).numpy(), atol=1e-4)
    rivals = torch.arange(0, describe(dense).vocab_size, 2)
    even = [[identity - identity % 2 for identity in sequences[0]]]
    (states,) = _read(layers, [_padded(even)])
    with layers.head() as head:
        nats, _ = _losses(head, states, even, rivals)
    with torch.no_grad():
        logits = model(torch.tensor(even)).logits[0][:-1, ::2]
    halves = torch.tensor(even[0][1:]) // 2
    assert np.allclose(nats[0], torch.nn.functional.cross_entropy(logits, halves, reduction="none"), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_nat_of_a_split_is_accounted_for(tmp_path: Path, kind: str) -> None:
    pieces = read_pieces(make(tmp_path / "model", kind))
    order = order_removals(pieces, np.arange(pieces.rows, 0, -1.0))
    kept = sorted(set(range(pieces.rows)) - set(order[: len(order) // 2].tolist()))
    text = " ".join([SENTENCES[0], DECLARATION["fr"], SENTENCES[1]])
    one = pieces.tokenizer().encode(text, add_special_tokens=False).ids
    other = [kept[identity] for identity in pieces.tokenizer(kept).encode(text, add_special_tokens=False).ids]
    assert sum(len(pieces.bytes[identity]) for identity in one) == sum(len(pieces.bytes[each]) for each in other)
    chance = np.random.default_rng(0)
    nats, nats_other = chance.random(len(one) - 1), chance.random(len(other) - 1)
    places, left = _compare(pieces, one, other, nats, nats_other)
    assert len(places) > 10
    assert all(place.token in one and place.token not in kept for place in places)
    met: set[int] = set()
    for place in places:
        assert place.again or place.token not in met
        met.add(place.token)
    ends = np.cumsum([len(pieces.bytes[identity]) for identity in one]).tolist()
    ends_other = np.cumsum([len(pieces.bytes[identity]) for identity in other]).tolist()
    first = next(end for number, end in enumerate(ends) if number >= WARM - 1 and end in ends_other)
    scored = nats_other[ends_other.index(first) :].sum() - nats[ends.index(first) :].sum()
    assert sum(place.nats for place in places) + left == pytest.approx(scored)


def test_the_regression_finds_a_plane() -> None:
    chance = np.random.default_rng(0)
    inputs = chance.normal(size=(400, 3))
    observed = 2.0 + inputs @ np.array([1.0, 0.0, -0.5])
    fitted, explained = _fit(inputs, observed + chance.normal(size=400), inputs)
    inside = np.abs(fitted - observed) < 0.35
    assert inside.mean() > 0.85  # what lies outside the 5th to 95th percentile is clipped
    assert 0.4 < explained < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_from_texts_to_a_trimmed_folder(tmp_path: Path, kind: str) -> None:
    dense = make(tmp_path / "model", kind, tie_word_embeddings=False)
    weights = {"scenario": 0.5, "language": 0.5}
    prices = price_vocabulary(dense, TEXTS, weights, own=TEXTS["language"], tokens=1500)
    assert 1000 < prices.note["sample_tokens"] < 3000
    assert prices.note["places"] > 20
    assert prices.dense_nats > 0
    prices.save(tmp_path / "prices.safetensors")
    again = load_prices(tmp_path / "prices.safetensors")
    assert (again.order == prices.order).all()
    assert (again.curve == prices.curve).all()
    assert (again.new_text == prices.new_text).all()
    assert prices.new_text.any()
    assert (again.rows, again.dense_nats, again.note) == (prices.rows, prices.dense_nats, prices.note)
    same = price_vocabulary(dense, TEXTS, weights, own=TEXTS["language"], tokens=1500)
    assert (same.order == prices.order).all()
    kept = prices.rows_for(prices.rows - 70)
    assert len(kept) % 64 == 0
    assert prices.rows - 70 <= len(kept) < prices.rows - 6
    assert set(kept) == set(range(prices.rows)) - set(prices.order[: prices.rows - len(kept)].tolist())
    assert 256 <= len(prices.rows_for(1)) < len(kept)
    assert prices.rows_for(prices.rows) == list(range(prices.rows))
    with pytest.raises(InvalidRequest, match=f"--vocab {prices.rows + 1}"):
        prices.rows_for(prices.rows + 1)
    trim_model(dense, kept, tmp_path / "trimmed")
    assert describe(dense).parameters - describe(tmp_path / "trimmed").parameters == 2 * 64 * (prices.rows - len(kept))


def test_what_is_left_out_tells_nothing(dense: Path) -> None:
    """Costs without one corpus' first document are those of the other windows alone."""
    pieces = read_pieces(dense)
    rates = np.random.default_rng(0).random(pieces.rows)
    splits = measure_splits(dense, pieces, TEXTS, rates, tokens=1500)
    name, documents = "language", TEXTS["language"]
    without = splits.costs(rates, lambda text: text == documents[0])
    assert without is not None
    others = [window for window in splits.windows if window.document != documents[0]]
    alone = Splits(pieces, list(TEXTS), others, splits.tokens).costs(rates)
    everything = splits.costs(rates)
    assert alone is not None
    assert everything is not None
    assert 0 < without.places == alone.places < everything.places
    assert (without.nats == alone.nats).all()
    assert (without.nats != everything.nats).any()
    assert (without.probability[name] == alone.probability[name]).all()
    assert (without.probability[name] != everything.probability[name]).any()
    assert splits.costs(rates, lambda text: text in documents) is None  # a corpus would be left without a window


def test_a_corpus_without_a_window_expects_nothing(dense: Path) -> None:
    prices = price_vocabulary(
        dense, {**TEXTS, "task": ["a"]}, {"scenario": 1.0, "language": 1.0, "task": 0.5}, tokens=1500
    )
    assert prices.note["places"] > 20
    assert np.isfinite(prices.curve).all()


def test_text_too_short_to_measure(dense: Path) -> None:
    pieces = read_pieces(dense)
    assert measure_splits(dense, pieces, {"scenario": ["a"]}, np.ones(pieces.rows)).costs(np.ones(pieces.rows)) is None
    with pytest.raises(InvalidRequest, match="--vocab keep"):
        price_vocabulary(dense, {"scenario": ["a"]}, {"scenario": 1.0})


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(InvalidRequest, match="different models"):
        read_pieces(folder)
