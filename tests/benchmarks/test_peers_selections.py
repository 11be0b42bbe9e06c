"""Selections under draws of the windows: the draws, and the choices beside what the library chooses itself."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from cusprun.benchmarks.peers.selections import (
    SCORED,
    Kept,
    bootstrap,
    by_chance,
    choose_refit,
    choose_scored,
    compare,
    jaccard,
    replacements,
    stays,
)
from cusprun.checkpoint import Weights
from cusprun.dense import Dense, find_dense
from cusprun.gram import Gram
from cusprun.importance import find_criterion
from cusprun.methods import score_layers
from cusprun.statistics import collect, walk
from cusprun.surgeon import choose_columns

SIZES = {"domain": 6, "task": 4}
REMOVE = 0.25


@pytest.fixture(scope="module")
def dense(pico_model: Path) -> Dense:
    return find_dense(str(pico_model))


@pytest.fixture(scope="module")
def windows(dense: Dense) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(3)
    return {name: chance.integers(3, dense.anatomy.vocab_size, (size, 32)) for name, size in SIZES.items()}


def test_draws() -> None:
    draws = bootstrap(SIZES, 50, seed=1)
    assert all({name: len(numbers) for name, numbers in draw.items()} == SIZES for draw in draws)
    assert {number for draw in draws for number in draw["task"]} == set(range(4))
    assert len({tuple(draw["domain"]) for draw in draws}) > 40
    base, *others = replacements(SIZES, 20, seed=1)
    assert {name: list(numbers) for name, numbers in base.items()} == {"domain": [0, 1, 2, 3, 4], "task": [0, 1, 2]}
    for draw in others:
        changed = [
            (name, int(new)) for name in SIZES for new, old in zip(draw[name], base[name], strict=True) if new != old
        ]
        assert changed in ([("domain", 5)], [("task", 3)])
    with pytest.raises(ValueError, match="one window"):
        replacements({"domain": 1}, 1, seed=1)


def test_jaccard() -> None:
    assert jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4})) == 0.5
    assert jaccard(frozenset(), frozenset()) == 1
    chance = np.random.default_rng(0)
    sets = [frozenset(chance.permutation(4000)[:3000].tolist()) for _ in range(2)]
    assert jaccard(*sets) == pytest.approx(by_chance(0.75), abs=0.02)


@pytest.mark.parametrize("method", SCORED)
def test_all_windows_once_give_the_method_s_own_choice(
    method: str, dense: Dense, windows: dict[str, np.ndarray]
) -> None:
    criterion = find_criterion(method)
    statistics = collect(dense.folder, dense.anatomy, windows, needs=criterion.needs)
    combine: Literal["intersection", "mixture"] = "intersection" if method == "cus-prun" else "mixture"
    tokens = {name: float(ids.size) for name, ids in windows.items()}
    scores = score_layers(Weights(dense.folder), dense.anatomy, statistics, criterion, combine, tokens)
    once = {name: np.arange(size) for name, size in SIZES.items()}
    twice = {name: np.repeat(np.arange(size), 2) for name, size in SIZES.items()}
    fewer = {name: np.zeros(size, dtype=int) for name, size in SIZES.items()}
    found = choose_scored(dense, windows, [once, twice, fewer], [0, 2], REMOVE, method)
    assert set(found) == {0, 2}
    for index, (kept, doubled, one) in found.items():
        assert kept.ffn == frozenset(scores[index].ffn.last(stays(128, REMOVE)))
        assert kept.kv_groups == frozenset(scores[index].attention.last(stays(2, REMOVE)))
        assert doubled == kept
        assert one.ffn != kept.ffn


def test_refit_s_choice_by_its_moments(dense: Dense, windows: dict[str, np.ndarray]) -> None:
    once = {name: np.arange(size) for name, size in SIZES.items()}
    twice = {name: np.repeat(np.arange(size), 2) for name, size in SIZES.items()}
    part = {"domain": np.array([0, 0, 3]), "task": np.array([1])}
    found = choose_refit(dense, windows, [once, twice, part], [1], REMOVE)
    assert set(found) == {1}
    gram, drawn = Gram.empty(128), Gram.empty(128)
    for index, batches in walk(dense.folder, dense.anatomy, windows, label="test"):
        for batch in batches:
            if index == 1:
                gram.add_batch(batch.channels, batch)
                for number in part[batch.dimension]:
                    if batch.start <= number < batch.start + len(batch.channels) // batch.window:
                        place = (number - batch.start) * batch.window
                        drawn.add(batch.channels[place : place + batch.window], 0)
    matrix = Weights(dense.folder)[f"{dense.anatomy.prefix(1)}mlp.down_proj.weight"].double()
    for moments, kept in ((gram.mean(0, 1), found[1][0]), (gram.mean(0, 1), found[1][1]), (drawn.mean(0), found[1][2])):
        assert kept.ffn == frozenset(choose_columns(matrix, [moments], [96])[0])
    assert isinstance(found[1][0].kv_groups, frozenset)
    assert torch.is_tensor(matrix)


def test_comparison(dense: Dense) -> None:
    first = Kept(frozenset(range(96)), frozenset({0, 1}))
    other = Kept(frozenset(range(32, 128)), frozenset({0}))
    found = compare({0: [first, first, other]}, dense)
    assert found["layers"]["0"]["kept"] == [1.0, 0.5]
    assert found["layers"]["0"]["removed"] == [1.0, 0.0]
    assert found["kept"] == 0.75
    assert found["kept, least"] == 0.5
    assert found["kv groups, least"] == 0.5
