"""Headings and paragraphs out of HTML pages, without navigation, tables of contents, tables and indexes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser

_SKIPPED_TAGS = {"script", "style", "table", "head", "nav", "footer", "svg", "form"}
_SKIPPED_CLASSES = {
    "toc",
    "navheader",
    "navfooter",
    "indexterm",
    "docnav",
    "footnotes",
    "index",
    "authorgroup",
    "legalnotice",
}
_BLOCKS = {"p", "li", "div", "dt", "dd", "pre", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article"}
_VOID = {"br", "hr", "img", "meta", "link", "input", "col", "wbr", "area", "base", "source"}


@dataclass(frozen=True)
class Block:
    """A paragraph (``level`` 0) or a heading (1 to 6)."""

    level: int
    text: str


@dataclass(frozen=True)
class Section:
    """A heading and the paragraphs below it, up to the next heading of its level or above."""

    heading: str
    paragraphs: tuple[str, ...]

    @property
    def body(self) -> str:
        return "\n\n".join(self.paragraphs)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._open: list[tuple[str, bool]] = []  # tag, and whether it hides what is in it
        self._pieces: list[str] = []
        self._level = 0
        self._listing = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self._pieces.append("\n")
        if tag in _VOID:
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in _BLOCKS:
            self._flush()
        if re.fullmatch("h[1-6]", tag):
            self._level = int(tag[1])
        self._listing += tag == "pre"
        self._open.append((tag, tag in _SKIPPED_TAGS or bool(classes & _SKIPPED_CLASSES)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self._pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag not in [name for name, _ in self._open]:
            return
        while self._open:
            name, _ = self._open[-1]
            if name in _BLOCKS:
                self._flush()
            self._listing -= name == "pre"
            self._open.pop()
            if name == tag:
                break

    def handle_data(self, data: str) -> None:
        if not any(hides for _, hides in self._open):
            self._pieces.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        text = "".join(self._pieces)
        text = text.strip("\n").rstrip() if self._listing else " ".join(text.split())
        if text.strip():
            self.blocks.append(Block(self._level, text))
        self._pieces, self._level = [], 0


def read_blocks(data: bytes) -> list[Block]:
    """The headings and paragraphs of an HTML page in UTF-8, in order."""
    reader = _Reader()
    reader.feed(data.decode("utf-8", "replace"))
    reader.close()
    return reader.blocks


def read_sections(data: bytes, deepest: int = 3) -> list[Section]:
    """The page cut at headings of level ``deepest`` and above; deeper headings stay as paragraphs."""
    sections: list[Section] = []
    heading, paragraphs = "", list[str]()
    for block in read_blocks(data):
        if 0 < block.level <= deepest:
            if paragraphs:
                sections.append(Section(heading, tuple(paragraphs)))
            heading, paragraphs = plain_heading(block.text), []
        else:
            paragraphs.append(block.text)
    if paragraphs:
        sections.append(Section(heading, tuple(paragraphs)))
    return sections


def plain_heading(text: str) -> str:
    """The heading without its number and its link mark."""
    text = re.sub(
        r"^\s*((chapter|kapitel|chapitre|capítulo|capitolo)\s+)?([0-9A-Z]{1,2}\.)+([0-9]+\.?)*\s*", "", text, flags=re.I
    )
    return text.strip(" ¶\n")
