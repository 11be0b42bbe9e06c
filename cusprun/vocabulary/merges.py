"""Which pieces can go together: BPE reaches a piece only through merges, so a kept piece needs what they need.

"hydraulic" is reached through "raulic", which never occurs by itself: what a piece costs has to be read together with
the costs of all the pieces that are made of it. Unigram has no merges, every piece stands alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from cusprun.vocabulary.pieces import Pieces

WIDEST = 64  # pieces that may go in one step


def close(pieces: Pieces, kept: Iterable[int]) -> set[int]:
    """``kept``, what has to stay anyway, and everything that their merges need."""
    found = set(kept) | pieces.protected
    open_ids = list(found)
    while open_ids:
        for part in pieces.needs.get(open_ids.pop(), ()):
            if part not in found:
                found.add(part)
                open_ids.append(part)
    return found


def order_removals(pieces: Pieces, price: np.ndarray) -> np.ndarray:
    """Every id that may go, in an order of which each beginning leaves a closed vocabulary, cheapest first.

    Greedy: of all sets {a piece and whatever is still made of it}, the one whose mean ``price``, (rows,) float64, is
    least goes next. Sets only get dearer as parts of them go, so that a heap of old means finds the least.
    """
    needs = pieces.needs
    made_of: dict[int, list[int]] = {}
    for product, parts in needs.items():
        for part in set(parts):
            made_of.setdefault(part, []).append(product)
    held = close(pieces, ())
    stays = [identity in held for identity in range(pieces.rows)]
    gone = [False] * pieces.rows
    waits = [False] * pieces.rows  # in the heap, with a mean that has only grown since
    cost: list[float] = price.tolist()

    def built_on(identity: int) -> set[int] | None:
        """The piece and what is made of it; None where that is too much or has to stay."""
        found, open_ids = {identity}, [identity]
        while open_ids:
            for product in made_of.get(open_ids.pop(), ()):
                if not gone[product] and product not in found:
                    if stays[product] or len(found) >= WIDEST:
                        return None
                    found.add(product)
                    open_ids.append(product)
        return found

    def mean(block: set[int]) -> float:
        return sum(cost[identity] for identity in block) / len(block)

    order: list[int] = []
    heap: list[tuple[float, int]] = []
    for identity in range(pieces.rows):
        if not stays[identity] and (block := built_on(identity)) is not None:
            heap.append((mean(block), -identity))
            waits[identity] = True
    heapq.heapify(heap)
    while heap:
        known, negative = heapq.heappop(heap)
        if gone[-negative] or (block := built_on(-negative)) is None:
            continue
        now = mean(block)
        if now > known * (1 + 1e-12):
            heapq.heappush(heap, (now, negative))
            continue
        for identity in block:
            gone[identity] = True
        order += sorted(block, key=lambda identity: (-len(pieces.texts[identity] or ""), -identity))  # products first
        for part in {part for identity in block for part in needs.get(identity, ())}:
            free = not (gone[part] or stays[part] or waits[part])
            if free and (rest := built_on(part)) is not None:
                heapq.heappush(heap, (mean(rest), -part))
                waits[part] = True
    return np.array(order, dtype=np.int64)
