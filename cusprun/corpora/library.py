"""From a catalog entry or the user's file to documents with sides: fetched, read, cleaned, split and kept once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cusprun.corpora.archives import read_members
from cusprun.corpora.cache import cache_folder, make_folder
from cusprun.corpora.catalog import Entry, Source
from cusprun.corpora.document import Document, Scenario, from_json, to_json
from cusprun.corpora.own import read_own
from cusprun.corpora.parsers import VERSION, Draft, find_parser
from cusprun.corpora.sources import fetch
from cusprun.corpora.split import (
    HELD_OUT,
    PERMUTATIONS,
    SHINGLE,
    THRESHOLD,
    Index,
    Side,
    assign_sides,
    prompt_key,
    sign,
)
from cusprun.corpora.text import DOCUMENT_LIMIT, split_text
from cusprun.errors import Failed
from cusprun.files import folder_written_whole
from cusprun.progress import say

ROW = 2  # raise when what is kept of a document changes
LEAST_SIDE = 0.1  # of a user's characters, for calibration as for evaluation
OWN_SIDES = 3  # raise when a user's text comes to other sides


@dataclass(frozen=True)
class Shelf:
    """The documents of one entry with their sides and signatures (n, 128), all in the same order."""

    name: str
    documents: tuple[Document, ...]
    sides: tuple[Side, ...]
    signatures: np.ndarray

    def numbers(self, *sides: Side) -> list[int]:
        """Positions of the documents on these sides."""
        return [number for number, side in enumerate(self.sides) if side in sides]


def open_shelf(entry: Entry) -> Shelf:
    """The documents of a catalog entry; fetches and reads it where that has not been done."""
    folder = _read_folder(entry)
    if not (folder / "documents.jsonl").is_file():
        documents, groups = _read_entry(entry)
        if not documents:
            raise Failed(f"{entry.name} holds no text that can be read; `cusprun-edge corpora show {entry.name}`")
        signatures = sign([document.text for document in documents])
        sides: Sequence[Side] = assign_sides(documents, groups, signatures, entry.family)
        if entry.reserve:
            sides = ["held-out" if side == "calibration" else side for side in sides]
        make_folder(folder.parent)
        with folder_written_whole(folder) as part:
            rows = [{**to_json(document), "side": side} for document, side in zip(documents, sides, strict=True)]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (part / "documents.jsonl").write_text(lines, encoding="utf-8")
            np.save(part / "signatures.npy", signatures, allow_pickle=False)
    with (folder / "documents.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    signatures = np.load(folder / "signatures.npy", allow_pickle=False)
    return Shelf(entry.name, tuple(map(from_json, rows)), tuple(row["side"] for row in rows), signatures)


def is_read(entry: Entry) -> bool:
    """Whether the entry's documents are in the cache."""
    return (_read_folder(entry) / "documents.jsonl").is_file()


def _read_folder(entry: Entry) -> Path:
    """Named after everything that the documents and their sides depend on."""
    described = entry.model_dump(mode="json", exclude={"tried"})
    settings = [VERSION, ROW, PERMUTATIONS, SHINGLE, THRESHOLD, HELD_OUT, described]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "read" / f"{entry.name}-{key[:16]}"


def _read_entry(entry: Entry) -> tuple[list[Document], list[str]]:
    """Documents and, for each, the group it came from."""
    documents: list[Document] = []
    groups: list[str] = []
    for draft in _drafts(entry):
        if draft.turns and len(draft.text) > DOCUMENT_LIMIT:
            continue  # an answer cannot be parted from its question
        pieces = [draft.text] if draft.turns else list(split_text(draft.text))
        for number, piece in enumerate(pieces):
            key = draft.key if len(pieces) == 1 else f"{draft.key}#{number}"
            tags = (entry.language, entry.domain, entry.task)
            group = draft.group or draft.key
            original = f"{entry.family or entry.name}/{group}"
            identity = f"{entry.name}/{key}"
            documents.append(Document(identity, piece, entry.name, *tags, draft.turns, draft.question, original))
            groups.append(group)
    return documents, groups


def _drafts(entry: Entry) -> Iterator[Draft]:
    source = entry.source
    if isinstance(source, Source):
        path = fetch(source)
        yield from find_parser(source.parser)(read_members(path, source.members), source.options)
    else:
        from cusprun.corpora.sources.hub import read_hub

        yield from read_hub(source)


def open_own(path: Path, name: str, scenario: Scenario) -> Shelf:
    """The user's file or folder, tagged with the scenario, with sides by the same rules; nothing is cached.

    A file or row that is cut into several documents lies on one side. Where that would leave a side with less than
    LEAST_SIDE of the text, there are too few originals, and their pieces are dealt out one by one, which is said.
    """
    documents = tuple(read_own(path, name, scenario))
    originals = [document.original for document in documents]
    signatures = sign([document.text for document in documents])
    sides = assign_sides(documents, originals, signatures)
    if len(set(originals)) < len(documents) and _least_share(documents, sides) < LEAST_SIDE:
        sides = assign_sides(documents, [document.id for document in documents], signatures)
        placed = set(zip(originals, sides, strict=True))
        if any((where, "calibration") in placed and (where, "held-out") in placed for where in originals):
            _say_once(
                f"{path.name}: too few texts to hold whole ones out: what is measured on are other parts of the texts "
                "that are calibrated on; give more files or rows where that is too easy"
            )
    return Shelf(name, documents, tuple(sides), signatures)


def _least_share(documents: Sequence[Document], sides: Sequence[Side]) -> float:
    """The share of the characters that the poorer side has."""
    characters = dict.fromkeys(("calibration", "held-out", "dropped"), 0)
    for document, side in zip(documents, sides, strict=True):
        characters[side] += len(document.text)
    return min(characters["calibration"], characters["held-out"]) / sum(characters.values())


_say_once = cache(say)  # a file is opened for several purposes


def without_leaks(shelves: Sequence[Shelf], kept_out: Sequence[Shelf]) -> dict[str, list[Document]]:
    """Calibration documents by shelf, less those that resemble a held-out document of any shelf.

    Sides hold within an entry; this holds across entries. A question whose prompt is held out elsewhere goes too.
    """
    index, prompts = Index(), set[str]()
    for shelf in {shelf.name: shelf for shelf in [*shelves, *kept_out]}.values():
        for number in shelf.numbers("held-out"):
            index.add(shelf.signatures[number])
            if prompt := prompt_key(shelf.documents[number]):
                prompts.add(prompt)
    return {
        shelf.name: [
            shelf.documents[number]
            for number in shelf.numbers("calibration")
            if prompt_key(shelf.documents[number]) not in prompts and not index.resembling(shelf.signatures[number])
        ]
        for shelf in shelves
    }
