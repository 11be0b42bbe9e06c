"""Calibration windows in, those to train on and those to check on out; no evaluation text is ever in either.

The dimensions of a scenario draw on the same library, so that one document can stand in several windows. Windows that
share a long run of tokens are kept on one side: a guard that has seen the training text guards nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SHARE = 1 / 10  # of each dimension's windows
RUN = 64  # tokens in a row that two windows share only where they hold the same document


@dataclass(frozen=True)
class Split:
    """Token ids, (n, window) int64 each, all dimensions one after another."""

    training: np.ndarray
    held_out: np.ndarray
    shared: int  # held-out windows that share a run with a training window, because the text gave no others


def split_windows(windows: Mapping[str, np.ndarray], seed: int, share: float = SHARE) -> Split:
    """Holds ``share`` of each dimension's windows out, at least one where there are two.

    Whole groups of windows that share text go, the smallest first, equal ones in an order that the seed draws. Where
    they do not suffice, windows out of larger groups follow and are counted as shared.
    """
    ids = np.concatenate([windows[name] for name in sorted(windows)])
    owner = [name for name in sorted(windows) for _ in range(len(windows[name]))]
    group = group_windows(ids, min(RUN, ids.shape[1] // 2))
    left = {name: max(1, round(share * len(windows[name]))) if len(windows[name]) > 1 else 0 for name in windows}
    if not any(left.values()):
        left[owner[0]] = 1
    members: dict[int, list[int]] = {}
    for window, number in enumerate(group):
        members.setdefault(number, []).append(window)
    order = sorted(members)
    random.Random(f"{seed}/held-out").shuffle(order)
    held: list[int] = []

    def hold(some: list[int]) -> None:
        held.extend(some)
        left.update({name: left[name] - count for name, count in Counter(owner[window] for window in some).items()})

    for number in sorted(order, key=lambda number: len(members[number])):
        found = members[number]
        if len(found) <= sum(max(0, count) for count in left.values()) and any(left[owner[w]] > 0 for w in found):
            hold(found)
    clean = set(held)
    for number in order:
        for window in members[number]:
            if window not in clean and left[owner[window]] > 0:
                hold([window])
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[held] = True
    trained = {group[window] for window in np.flatnonzero(~chosen)}
    return Split(ids[~chosen], ids[chosen], sum(group[window] in trained for window in held))


def group_windows(ids: np.ndarray, run: int) -> list[int]:
    """One number a window of ``ids``, (n, window) int64; windows that share ``run`` tokens in a row have the same one.

    Runs are compared by a polynomial hash modulo 2^64 (Karp and Rabin 1987).
    """
    parent = list(range(len(ids)))

    def root(window: int) -> int:
        while parent[window] != window:
            parent[window] = parent[parent[window]]
            window = parent[window]
        return window

    first: dict[int, int] = {}
    for window, hashes in enumerate(run_hashes(ids, run)):
        for value in set(hashes.tolist()):
            parent[root(window)] = root(first.setdefault(value, window))
    return [root(window) for window in range(len(ids))]


def run_hashes(ids: np.ndarray, run: int) -> np.ndarray:
    """The hash of the ``run`` tokens from each place on, (n, window - run + 1) uint64: Σ_j (id_j + 1) B^(run-1-j)."""
    base = np.uint64(0x9E3779B97F4A7C15)
    places = ids.shape[1] - run + 1
    hashes = np.zeros((len(ids), places), dtype=np.uint64)
    for offset in range(run):
        hashes = hashes * base + (ids[:, offset : offset + places].astype(np.uint64) + np.uint64(1))
    return hashes
