"""Cleaning, cutting and telling languages apart."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_LIMIT = 20_000  # characters of one document

_STOP_WORDS: dict[str, frozenset[str]] = {
    line.split(":")[0]: frozenset(line.split(":")[1].split())
    for line in Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8").splitlines()
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")


def clean(text: str) -> str:
    """NFC text without control characters, trailing blanks and runs of blank lines."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " "))
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be tokenized
    text = _CONTROL.sub("", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_text(text: str, limit: int = DOCUMENT_LIMIT) -> Iterator[str]:
    """Pieces of at most ``limit`` characters, cut between paragraphs where it can be, else at a blank."""
    piece = ""
    for paragraph in text.split("\n\n"):
        while len(paragraph) > limit:
            if piece:
                yield piece
                piece = ""
            cut = max(paragraph.rfind(mark, limit // 2, limit) for mark in ("\n", " ")) + 1 or limit
            yield paragraph[:cut].rstrip()
            paragraph = paragraph[cut:].lstrip()
        if piece and len(piece) + len(paragraph) + 2 > limit:
            yield piece
            piece = paragraph
        else:
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece.strip():
        yield piece


def language_of(text: str) -> str | None:
    """The language whose stop words are the most frequent; None for text with hardly any (a table, a listing)."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) < 6:
        return None
    shares = {language: sum(word in stop for word in words) / len(words) for language, stop in _STOP_WORDS.items()}
    best = max(shares, key=lambda language: shares[language])
    return best if shares[best] >= 0.12 else None


def keep_language(text: str, language: str) -> str:
    """The text without the paragraphs that are in another language; untranslated English in a translation, say."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part for part in paragraphs if language_of(part) in (language, None))
