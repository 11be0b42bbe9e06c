"""Calibration or held-out: near-duplicates by MinHash (Broder 1997), sides that never change.

Groups of documents (a group is one original text; a long one is several documents) are taken in their order. A group
that resembles none before it goes to the side that the hash of its own normalised content says; one that resembles
earlier groups goes to their side; one that resembles groups of both sides is dropped. So no near-duplicate pair lies
across the sides, and adding text at the end of an entry moves nothing that was there. Resemblance is the Jaccard
similarity of the sets of 5-word shingles, estimated from 128 permutations, at least 0.7; texts that share a passage
but not most of their words do not count as duplicates.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from cusprun.corpora.document import Document, content_hash, normalised

if TYPE_CHECKING:
    from datasketch import MinHashLSH

Side = Literal["calibration", "held-out", "dropped"]

PERMUTATIONS = 128
SHINGLE = 5  # words
THRESHOLD = 0.7
HELD_OUT = 0.3  # share of the groups
SEED = 1
_SCHEME = "affine32"  # named, so that signatures do not depend on the default of a datasketch version
_BANDS = (42, 3)  # of the index: a pair at the threshold is missed once in fifty million; estimates decide after it


def sign(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures, (len(texts), 128) uint32."""
    from datasketch import MinHash

    signatures = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    blank = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=_shingle_hash, scheme=_SCHEME)
    for row, text in enumerate(texts):
        minhash = blank.copy()
        minhash.update_batch(_shingles(text))
        signatures[row] = minhash.hashvalues
    return signatures


def _shingle_hash(shingle: bytes) -> int:
    return zlib.crc32(shingle)


def _shingles(text: str) -> list[bytes]:
    words = normalised(text).split()
    if len(words) <= SHINGLE:
        return [" ".join(words).encode("utf-8", "surrogatepass")]
    spans = {" ".join(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}
    return [span.encode("utf-8", "surrogatepass") for span in spans]


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Estimated Jaccard similarity of two signatures."""
    return float(np.mean(one == other))


class Index:
    """Signatures that can be asked which of them resemble a given one."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._lsh: MinHashLSH = MinHashLSH(num_perm=PERMUTATIONS, params=_BANDS)
        self._signatures: list[np.ndarray] = []

    def add(self, signature: np.ndarray) -> int:
        """Adds a signature and returns its number."""
        self._signatures.append(signature)
        self._lsh.insert(len(self._signatures) - 1, _minhash(signature), check_duplication=False)
        return len(self._signatures) - 1

    def resembling(self, signature: np.ndarray) -> list[int]:
        """Numbers of the signatures whose similarity is at least the threshold, in order."""
        found = self._lsh.query(_minhash(signature)) if self._signatures else []
        return sorted(number for number in found if similarity(self._signatures[number], signature) >= THRESHOLD)


def _minhash(signature: np.ndarray) -> object:
    from datasketch import LeanMinHash

    return LeanMinHash(seed=SEED, hashvalues=signature, scheme=_SCHEME)


def hashed_side(text: str) -> Side:
    """The side of a group that resembles nothing before it, by a fixed hash of its normalised content (or name)."""
    return "held-out" if int(content_hash(text)[:8], 16) < HELD_OUT * 2**32 else "calibration"


def assign_sides(
    documents: Sequence[Document], groups: Sequence[str], signatures: np.ndarray, family: str = ""
) -> list[Side]:
    """The side of each document of one entry; documents of the same group share it.

    With a ``family`` it is the group's name that is hashed, so that entries of one family which show the same text in
    different ways (a paper, and its abstract) put it on the same side.

    A question also goes with the earlier ones that have the same prompt, whatever their choices.
    """
    index = Index()
    side_of_group: dict[str, Side] = {}
    group_of_number: list[str] = []
    group_of_prompt: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    for group, numbers in members.items():
        earlier: set[str] = set()
        for number in numbers:
            earlier |= {group_of_number[found] for found in index.resembling(signatures[number])}
            if prompt := prompt_key(documents[number]):
                earlier |= {group_of_prompt[prompt]} if prompt in group_of_prompt else set()
        sides = {side_of_group[found] for found in earlier}
        if not sides:
            content = "\n".join(documents[number].text for number in numbers)
            side_of_group[group] = hashed_side(f"{family} {group}" if family else content)
        elif len(sides) == 1:
            side_of_group[group] = sides.pop()
        else:
            side_of_group[group] = "dropped"
            continue
        for number in numbers:
            index.add(signatures[number])
            group_of_number.append(group)
            if prompt := prompt_key(documents[number]):
                group_of_prompt.setdefault(prompt, group)
    return [side_of_group[group] for group in groups]


def prompt_key(document: Document) -> str | None:
    """The normalised prompt of a question that is long enough to be one's own, else None."""
    if document.question is None:
        return None
    words = normalised(document.question.prompt)
    return words if len(words.split()) > 2 * SHINGLE else None
