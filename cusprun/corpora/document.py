"""The values that leave this room: a document, a multiple-choice question, the scenario they belong to."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.runtimes import Message


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; ``answer`` is the index of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Document:
    """A piece of clean text with its tags; for items with an answer, ``turns`` are what a chat template is given."""

    id: str  # "<entry>/<stable key>"
    text: str  # plain text; question and answer joined where there are turns
    entry: str  # catalog name, or "file:<name>" for the user's own text
    language: str | None
    domain: str | None
    task: str | None  # None for running text
    turns: tuple[Message, ...] = ()
    question: Question | None = None
    original: str = ""  # what it is a piece of: sections of a paper and its abstract share it, pieces of a file or row


@dataclass(frozen=True)
class WeightedDocument:
    """A document and the share of the tokens that its entry is to get, relative to the other entries of the corpus."""

    document: Document
    weight: float


@dataclass(frozen=True)
class Scenario:
    """What the expert is for; each dimension is optional."""

    language: str | None = None
    domain: str | None = None
    task: str | None = None

    def given(self) -> dict[str, str]:
        """The dimensions that are set, in the order language, domain, task."""
        values = {"language": self.language, "domain": self.domain, "task": self.task}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return "-".join(self.given().values()) or "general"


@dataclass(frozen=True)
class OwnText:
    """The user's own text (``--corpus FILE[:weight]``); ``weight`` is relative to all catalog text = 1."""

    path: Path
    weight: float = 1.0


def normalised(text: str) -> str:
    """Case-folded words with single spaces: what counts as the same text when sides are given out."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def content_hash(text: str) -> str:
    """Hex sha256 of the normalised text."""
    return hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint(documents: Iterable[Document | WeightedDocument]) -> str:
    """Hex sha256 over ids, texts and weights in order: the part of a stage's key that says which text it saw."""
    digest = hashlib.sha256()
    for item in documents:
        document, weight = (item.document, item.weight) if isinstance(item, WeightedDocument) else (item, 1.0)
        digest.update(f"{document.id}\0{weight!r}\0".encode())
        digest.update(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def to_json(document: Document) -> dict[str, Any]:
    """A JSON-ready dict; :func:`from_json` turns it back."""
    row: dict[str, Any] = {
        "id": document.id,
        "text": document.text,
        "entry": document.entry,
        "language": document.language,
        "domain": document.domain,
        "task": document.task,
        "original": document.original,
    }
    if document.turns:
        row["turns"] = [[turn.role, turn.content] for turn in document.turns]
    if document.question:
        row["question"] = [document.question.prompt, list(document.question.choices), document.question.answer]
    return row


def from_json(row: dict[str, Any]) -> Document:
    """The document that :func:`to_json` wrote."""
    question = row.get("question")
    return Document(
        id=row["id"],
        text=row["text"],
        entry=row["entry"],
        language=row["language"],
        domain=row["domain"],
        task=row["task"],
        original=row["original"],
        turns=tuple(Message(role, content) for role, content in row.get("turns", ())),
        question=Question(question[0], tuple(question[1]), question[2]) if question else None,
    )
