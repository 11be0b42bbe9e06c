"""What a token's absence costs: the same text as the dense tokenizer splits it, and with tokens left out.

A random half of the rarer tokens is left out, the dense model scores a sample of text both ways, and each place where a
token fell into pieces gives one cost: the nats of its pieces and of the tokens right behind them, less those of the
token and what followed it. A ridge regression on a few properties carries the costs over to tokens that the sample
does not hold. Tokens that are left out are no rivals any more: the softmax runs over the kept ones. Where a token has
been read in pieces before, its pieces cost the model far less: that share is measured too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cusprun.anatomy import describe
from cusprun.layerwise import LayerwiseModel
from cusprun.progress import track
from cusprun.vocabulary.merges import close
from cusprun.vocabulary.pieces import Pieces

if TYPE_CHECKING:
    import torch

SAMPLE = 16384  # tokens through the model, both ways together
CHARACTERS = 560  # of one window: some 128 tokens of English
COMMON = 0.85  # share of a text's tokens, the most frequent, that are never left out
KEPT = 2 / 3  # share of the rows from which the others are left out
LEFT_OUT = 0.5
BEHIND = 3  # unchanged tokens behind a split whose loss counts as its own
WARM = 8  # positions of a window that are not scored
CANDIDATES = 4  # windows looked at for each that is taken: the rarer its tokens, the more it tells
AGAIN = 0.3  # of the first split's nats in a text that the same token's next costs, where the sample shows too few
FEWEST = 30  # places that show it
RIDGE = 0.01  # on standardized properties, for each observation
LOGITS = 2**25  # elements of one batch's logits at most


@dataclass(frozen=True)
class SplitCosts:
    """Nats that each token's absence adds where it occurs first in a text, (rows,), the share of them that it adds
    where it occurs again, and what they were estimated from.
    """

    nats: np.ndarray
    again: float
    probability: dict[str, np.ndarray]  # the dense model's mean probability of each token, by corpus, (rows,)
    places: int  # where a token fell into pieces
    mean_nats: float  # over those of these places where it was the first of its kind
    explained: float  # share of the variance over these places that the properties explain
    dense_nats: float  # the dense model's loss on a byte of the sample
    tokens: int  # through the model


@dataclass(frozen=True)
class _Place:
    """One split: the token that is missing, the nats it took more, and whether the window had it before."""

    token: int
    nats: float
    again: bool


@dataclass(frozen=True)
class _Window:
    """What the dense model made of one window of a document: its splits, and the nats that belong to none of them.

    ``probability`` (rows,) is the sum over the window's ``positions`` that are scored; ``nats`` over ``n_bytes`` are
    those of the text as it is.
    """

    corpus: str
    document: str
    places: list[_Place]
    surplus: float
    probability: np.ndarray
    positions: int
    nats: float
    n_bytes: int


@dataclass(frozen=True)
class Splits:
    """What was seen where tokens fell into pieces, window by window."""

    pieces: Pieces
    corpora: Sequence[str]
    windows: list[_Window]
    tokens: int  # through the model

    def costs(self, rates: np.ndarray, without: Callable[[str], bool] | None = None) -> SplitCosts | None:
        """What the windows tell, but those of documents for which ``without`` holds.

        ``rates`` (rows,) say how frequent each token is. None where this takes all windows of a corpus, or no token is
        left that falls into pieces.
        """
        left = [window for window in self.windows if without is None or not without(window.document)]
        places = [place for window in left for place in window.places]
        emptied = {window.corpus for window in self.windows} - {window.corpus for window in left}
        if emptied or all(place.again for place in places):
            return None
        probability = {}
        for name in self.corpora:
            its = [window for window in left if window.corpus == name]
            summed = sum((window.probability for window in its), np.zeros(self.pieces.rows))
            probability[name] = summed / max(sum(window.positions for window in its), 1)
        surplus = sum(window.surplus for window in left) / len(places)
        nats = np.array([place.nats for place in places]) + surplus
        again = np.array([place.again for place in places])
        observed, repeated = nats[~again], nats[again]
        share = float(np.clip(repeated.mean() / observed.mean(), 0, 1)) if len(repeated) >= FEWEST else AGAIN
        inputs = _properties(self.pieces, rates, _spellings(self.pieces, rates))
        seen = np.array([place.token for place in places])[~again]
        fitted, explained = _fit(inputs[seen], observed, inputs)
        dense_nats = sum(window.nats for window in left) / max(sum(window.n_bytes for window in left), 1)
        return SplitCosts(
            fitted, share, probability, len(places), float(observed.mean()), explained, dense_nats, self.tokens
        )


def measure_splits(
    folder: Path,
    pieces: Pieces,
    texts: Mapping[str, Sequence[str]],
    rates: np.ndarray,
    *,
    tokens: int = SAMPLE,
    seed: int = 0,
    device: str = "cpu",
) -> Splits:
    """Scores windows of ``texts`` (documents by corpus, equal shares) with the dense model in ``folder``.

    ``rates`` (rows,) say how frequent each token is.
    """
    import torch

    chance = random.Random(seed)
    kept = _leave_out(pieces, rates, chance)
    dense, trimmed = pieces.tokenizer(), pieces.tokenizer(kept)
    rare = np.ones(pieces.rows)
    rare[kept] = 0
    old = np.array(kept)
    rivals = torch.tensor(old, device=device)
    size = max(1, LOGITS // (pieces.rows * CHARACTERS // 3))
    # corpus, documents, their windows as they are spelled, as they would be
    batches: list[tuple[str, list[str], list[list[int]], list[list[int]]]] = []
    for name, documents in texts.items():
        cut = _choose(documents, dense, rare, tokens // (2 * len(texts)), chance)
        for start in range(0, len(cut), size):
            of = [document for document, _ in cut[start : start + size]]
            batch = [window for _, window in cut[start : start + size]]
            whole = [encoding.ids for encoding in dense.encode_batch(batch, add_special_tokens=False)]
            split = [old[encoding.ids].tolist() for encoding in trimmed.encode_batch(batch, add_special_tokens=False)]
            batches.append((name, of, whole, split))
    model = LayerwiseModel(folder, describe(folder), device, fast=True)
    states = _read(model, [_padded(side) for _, _, *sides in batches for side in sides])
    windows: list[_Window] = []
    spent = 0
    with model.head() as head:
        for number, (name, of, whole, split) in enumerate(batches):
            spent += sum(map(len, whole)) + sum(map(len, split))
            before, summed = _losses(head, states[2 * number], whole, None)
            after, _ = _losses(head, states[2 * number + 1], split, rivals)
            for document, one, other, nats_one, nats_other, probability in zip(
                of, whole, split, before, after, summed, strict=True
            ):
                places, surplus = _compare(pieces, one, other, nats_one, nats_other)
                n_bytes = sum(len(pieces.bytes[identity]) for identity in one[1:])
                nats = float(nats_one.sum())
                windows.append(_Window(name, document, places, surplus, probability, len(one) - WARM, nats, n_bytes))
    return Splits(pieces, list(texts), windows, spent)


def _leave_out(pieces: Pieces, rates: np.ndarray, chance: random.Random) -> list[int]:
    """Ids that stay: the most frequent, and half of the others that a trimmed vocabulary may well hold."""
    order = np.argsort(-rates, kind="stable").tolist()
    covered = np.cumsum(rates[order]) / rates.sum()
    common, usual = int(np.searchsorted(covered, COMMON)), int(KEPT * pieces.rows)
    stay = order[:common] + [identity for identity in order[common:usual] if chance.random() >= LEFT_OUT]
    return sorted(close(pieces, (identity for identity in stay if pieces.texts[identity] is not None)))


def _choose(
    documents: Sequence[str], tokenizer: Any, rare: np.ndarray, tokens: int, chance: random.Random
) -> list[tuple[str, str]]:
    """Documents and windows of them of about CHARACTERS, with ``tokens`` tokens in all; of CANDIDATES drawn, the one
    with most rare ones.
    """
    starts = [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(0, len(document) - CHARACTERS // 2, CHARACTERS)
    ]
    chance.shuffle(starts)
    chosen: list[tuple[str, str]] = []
    given = 0
    while starts and given < tokens:
        places, starts = starts[:CANDIDATES], starts[CANDIDATES:]
        drawn = [_window(documents[number], start) for number, start in places]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(drawn, add_special_tokens=False)]
        best = max(range(len(drawn)), key=lambda index: float(rare[ids[index]].sum()))
        if len(ids[best]) > 2 * WARM:
            chosen.append((documents[places[best][0]], drawn[best]))
            given += len(ids[best])
        starts += places[:best] + places[best + 1 :]  # a short text is used up in the end
    return chosen


def _window(document: str, start: int) -> str:
    """Text from ``start`` on, cut before a blank at both ends where there is one."""
    begin = document.find(" ", start, start + CHARACTERS // 2) if start else 0
    begin = start if begin < 0 else begin
    end = document.rfind(" ", begin + 1, begin + CHARACTERS)
    return document[begin : end if end > begin + CHARACTERS // 2 else begin + CHARACTERS]


def _padded(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Token ids as rows of one length, int64; what pads a row stands behind it: no earlier position sees it."""
    length = max(map(len, sequences))
    return np.array([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences], dtype=np.int64)


def _read(model: LayerwiseModel, batches: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Hidden states after the last layer for each batch of ids; one layer's weights are in memory at a time."""
    import torch

    if not batches:
        return []
    with torch.inference_mode():
        together = model.embed(np.concatenate([ids.ravel() for ids in batches])[None])[0]  # the table is read once
        states = [
            part.unflatten(0, ids.shape).to(model.device)
            for part, ids in zip(together.split([ids.size for ids in batches]), batches, strict=True)
        ]
        for index in track(range(len(model.anatomy.layers)), "costs of splits, layer by layer"):
            with model.layer(index) as layer:
                states = [model.forward(layer, batch) for batch in states]
    return states


def _losses(
    head: Any, states: torch.Tensor, sequences: Sequence[Sequence[int]], rivals: torch.Tensor | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """-ln p of each token but the first given those before it, (length - 1,) for each sequence, and the sum of the
    probabilities of every token over its positions from WARM on, (rows,). With ``rivals`` the softmax runs over these
    alone, and no probabilities are summed.
    """
    import torch

    ids = torch.from_numpy(_padded(sequences)).to(states.device)
    with torch.inference_mode():
        logits = head(states)
        reached = logits if rivals is None else logits[..., rivals]
        norm = torch.logsumexp(reached, dim=-1)
        chosen = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        nats = (norm[:, :-1] - chosen).double().cpu().numpy()
        summed = []
        for row, sequence in enumerate(sequences if rivals is None else ()):
            scored = logits[row, WARM : len(sequence)]
            summed.append(torch.exp(scored - norm[row, WARM : len(sequence), None]).sum(0).cpu().numpy())
    return [nats[row, : len(sequence) - 1] for row, sequence in enumerate(sequences)], summed


def _compare(
    pieces: Pieces, one: Sequence[int], other: Sequence[int], nats_one: np.ndarray, nats_other: np.ndarray
) -> tuple[list[_Place], float]:
    """The places where a token of ``one`` falls into pieces of ``other``, and the nats that belong to no place."""
    ends_one = np.cumsum([len(pieces.bytes[identity]) for identity in one])
    ends_other = np.cumsum([len(pieces.bytes[identity]) for identity in other])
    shared = np.intersect1d(ends_one, ends_other)
    total_one = dict(zip(ends_one.tolist(), np.cumsum([0.0, *nats_one]).tolist(), strict=True))
    total_other = dict(zip(ends_other.tolist(), np.cumsum([0.0, *nats_other]).tolist(), strict=True))
    number_one = dict(zip(ends_one.tolist(), range(len(one)), strict=True))
    number_other = dict(zip(ends_other.tolist(), range(len(other)), strict=True))
    places: list[_Place] = []
    left, near = 0.0, 0
    for begin, end in zip(shared[:-1].tolist(), shared[1:].tolist(), strict=True):
        first, last = number_one[begin] + 1, number_one[end]
        if first < WARM:
            continue
        extra = (total_other[end] - total_other[begin]) - (total_one[end] - total_one[begin])
        same = list(one[first : last + 1]) == list(other[number_other[begin] + 1 : number_other[end] + 1])
        if not same and first == last:
            places.append(_Place(one[first], extra, one[first] in one[:first]))
            near = BEHIND
        elif same and near:
            places[-1] = replace(places[-1], nats=places[-1].nats + extra)
            near -= 1
        else:
            left, near = left + extra, 0
    return places, left


def _spellings(pieces: Pieces, rates: np.ndarray) -> list[list[int]]:
    """What each token falls into where two thirds of the rows are kept: its parts, [] for what cannot go."""
    order = np.argsort(-rates, kind="stable")[: int(KEPT * pieces.rows)].tolist()
    kept = sorted(close(pieces, (identity for identity in order if pieces.texts[identity] is not None)))
    made_of = pieces.needs
    alone = [identity for identity in kept if identity not in made_of and identity not in pieces.protected]
    spelled: list[list[int]] = [[] for _ in range(pieces.rows)]
    halves = (set(alone[::2]), set(alone[1::2])) if alone else (set[int](),)
    for half in halves:  # a piece that no merge makes has parts only in its absence
        left = [identity for identity in kept if identity not in half]
        inside = set(left)
        model = pieces.tokenizer(left).model
        for identity, text in enumerate(pieces.texts):
            if text is None or identity in pieces.protected:
                continue
            if identity not in inside:
                spelled[identity] = [left[token.id] for token in model.tokenize(text)]
            elif identity in made_of:
                spelled[identity] = list(made_of[identity])
    return spelled


def _properties(pieces: Pieces, rates: np.ndarray, spelled: Sequence[Sequence[int]]) -> np.ndarray:
    """Properties of each token that tell what its split costs, (rows, 7) float64."""
    floor = rates[rates > 0].min(initial=1.0) / 10
    log = np.log(np.maximum(rates, floor))
    found = np.zeros((len(spelled), 7))
    for identity, parts in enumerate(spelled):
        if parts:
            own = pieces.bytes[identity]
            found[identity] = [
                len(parts),
                log[identity],
                log[parts[0]],
                log[parts[-1]],
                own[:1] == b" ",
                np.log(len(own) or 1),
                np.log(len(pieces.bytes[parts[0]]) or 1),
            ]
    return found


def _fit(inputs: np.ndarray, observed: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Ridge regression of ``observed`` (n,) on ``inputs`` (n, k), read at ``wanted`` (rows, k), and what it explains.

    A prediction stays between the 5th and 95th percentile of those at the observations.
    """
    mean, spread = inputs.mean(0), inputs.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    standard = (inputs - mean) / spread
    centre = observed.mean()
    gram = standard.T @ standard + RIDGE * len(observed) * np.eye(inputs.shape[1])
    slopes = np.linalg.solve(gram, standard.T @ (observed - centre))
    at_places = standard @ slopes + centre
    low, high = np.percentile(at_places, [5, 95])
    variance = float(((observed - centre) ** 2).mean())
    explained = 1 - float(((observed - at_places) ** 2).mean()) / variance if variance > 0 else 0.0
    return np.clip((wanted - mean) / spread @ slopes + centre, max(low, 0.0), max(high, 0.0)), explained
