"""From documents to token windows: rendered by the model's conventions, balanced by weight, cut to equal length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cusprun.corpora.document import Document, WeightedDocument
from cusprun.errors import InvalidRequest

FEWEST = 4  # windows; fewer are no sample of anything


def render(document: Document, tokenizer: Any) -> str:
    """The document as the model reads it: turns through the tokenizer's chat template where it has one, else the text.

    Turns that the template refuses (a system turn, say) are joined into one question before.
    """
    if not document.turns or not getattr(tokenizer, "chat_template", None):
        return document.text
    messages = [{"role": turn.role, "content": turn.content} for turn in document.turns]
    if len(messages) > 1 and messages[0]["role"] == "system" and "system" not in tokenizer.chat_template:
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids as the model's convention has a text: its begin token where the tokenizer adds one, and an end token.

    Special tokens that the chat template wrote count as such and are not doubled.
    """
    text = render(document, tokenizer)
    templated = bool(document.turns) and bool(getattr(tokenizer, "chat_template", None))
    ids: list[int] = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and not templated and (not ids or ids[-1] != end):
        ids.append(end)
    return ids


Piece = tuple[str, int]  # id of a document and the token of it that comes first


def pack_windows(
    documents: Sequence[Document | WeightedDocument],
    tokenizer: Any,
    tokens: int,
    window: int,
    seed: int,
    dealt: set[Piece] | None = None,
) -> np.ndarray:
    """Joins documents and cuts them into windows of exactly ``window`` tokens, about ``tokens`` in all.

    Returns int64 (n, window), n = tokens // window or what the text gives. Each entry gets its weight's share of the
    tokens (entries of plain documents share alike; what a small entry cannot give goes to the others). Long documents
    give one piece at a time, from a place that the seed chooses. What is in ``dealt``, which other corpora have taken,
    comes after all else of its entry, and what is taken here joins it. The same arguments give the same windows. Raises
    InvalidRequest where the text gives fewer than four windows.
    """
    if window < 2 or tokens < window * FEWEST:
        raise InvalidRequest(f"--tokens {tokens} is less than {FEWEST} windows of {window} tokens; give more")
    weights: dict[str, float] = {}
    by_entry: dict[str, list[Document]] = {}
    for item in documents:
        document, weight = (item.document, item.weight) if isinstance(item, WeightedDocument) else (item, 1.0)
        by_entry.setdefault(document.entry, []).append(document)
        weights[document.entry] = weight
    dealt = set() if dealt is None else dealt
    supplies = {
        name: _pieces(group, tokenizer, 2 * window, f"{seed}/{name}", frozenset(dealt))
        for name, group in by_entry.items()
    }
    given = dict.fromkeys(supplies, 0)
    stream: list[int] = []
    wanted = tokens // window * window
    while len(stream) < wanted and supplies:
        name = min(supplies, key=lambda entry: (given[entry] + 1) / weights[entry])
        piece = next(supplies[name], None)
        if piece is None:
            del supplies[name]
            continue
        place, ids = piece
        stream.extend(ids)
        given[name] += len(ids)
        dealt.add(place)
    count = min(len(stream), wanted) // window
    if count < FEWEST:
        raise InvalidRequest(
            f"the text gives {len(stream)} tokens, fewer than {FEWEST} windows of {window}; "
            "give more with --corpus FILE"
        )
    windows = np.array(stream[: count * window], dtype=np.int64).reshape(count, window)
    order = list(range(count))
    random.Random(f"{seed}/order").shuffle(order)
    return windows[order]


def _pieces(
    documents: Sequence[Document], tokenizer: Any, length: int, seed: str, dealt: frozenset[Piece]
) -> Iterator[tuple[Piece, list[int]]]:
    """One piece of each document in shuffled order, then what is left of the long ones, then those ``dealt`` before;
    tokenized when asked for.
    """
    chance = random.Random(seed)
    order = sorted(documents, key=lambda document: document.id)
    chance.shuffle(order)
    left: list[tuple[Piece, list[int]]] = []
    again: list[tuple[Piece, list[int]]] = []
    for document in order:
        ids = encode(document, tokenizer)
        pieces = [((document.id, start), ids[start : start + length]) for start in range(0, len(ids), length)]
        if pieces:
            first = pieces.pop(chance.randrange(len(pieces)))
            left.extend(pieces)
            if first[0] in dealt:
                again.append(first)
            else:
                yield first
    chance.shuffle(left)
    yield from sorted([*again, *left], key=lambda piece: piece[0] in dealt)
