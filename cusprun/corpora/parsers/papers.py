"""Scientific papers in JATS XML (PLOS): the body as text, and body to abstract as a summary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from cusprun.corpora.parsers import Draft, Members, Options, pair
from cusprun.corpora.text import clean

_SKIPPED = {
    "table-wrap",
    "fig",
    "disp-formula",
    "inline-formula",
    "supplementary-material",
    "table",
    "graphic",
    "media",
}
_LICENCES = ("creative commons attribution license", "licenses/by/", "publicdomain/zero", "cc0", "public domain")
EXCERPT = 4000  # characters of the introduction that the abstract is asked from


def parse_papers(members: Members, options: Options) -> Iterator[Draft]:
    """One draft per section of a paper's body."""
    for key, article in _open_papers(members):
        for number, section in enumerate(article.findall("body/sec"), 1):
            text = _prose(section)
            if len(text) >= 400:
                yield Draft(f"{key}/{number}", text, group=key)


def parse_abstracts(members: Members, options: Options) -> Iterator[Draft]:
    """The beginning of a paper, and its abstract as the summary."""
    for key, article in _open_papers(members):
        abstract = article.find("front/article-meta/abstract")
        body = article.find("body")
        if abstract is None or body is None:
            continue
        summary, text = _prose(abstract), _prose(body)
        if len(summary) >= 200 and len(text) >= 1000:
            excerpt = text[:EXCERPT].rsplit(" ", 1)[0]
            yield pair(key, f"Summarize this article in one paragraph.\n\n{excerpt}", summary, group=key)


def _open_papers(members: Members) -> Iterator[tuple[str, ElementTree.Element]]:
    """Papers whose own licence statement is Creative Commons Attribution or a public-domain dedication."""
    for name, data in members:
        article = ElementTree.fromstring(data)
        permissions = article.find("front/article-meta/permissions")
        if permissions is None:
            continue
        statement = ElementTree.tostring(permissions, encoding="unicode").lower()
        if any(licence in statement for licence in _LICENCES):
            yield name.rsplit("/", 1)[-1].removesuffix(".xml"), article


def _prose(element: ElementTree.Element) -> str:
    """Headings and paragraphs, without figures, tables, formulas and reference marks."""
    blocks = []
    for node in _walk(element):
        words = " ".join(_words(node).split())
        words = re.sub(r"\s*\[[\s,;–-]*\]|\s*\([\s,;–-]*\)", "", words)  # what cited numbers leave behind
        words = re.sub(r"(\s+[,–-])+\s*(?=[.,;:)])|\s+(?=[.,;:])", "", words)
        if words:
            blocks.append(words)
    return clean("\n\n".join(blocks))


def _walk(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for child in element:
        if child.tag in _SKIPPED:
            continue
        if child.tag in ("title", "p"):
            yield child
        else:
            yield from _walk(child)


def _words(element: ElementTree.Element) -> str:
    pieces = [element.text or ""]
    for child in element:
        words = _words(child) if child.tag not in _SKIPPED else ""
        cited = child.tag == "xref" and child.get("ref-type") == "bibr" and not re.search(r"[^\W\d_]", words)
        pieces.append("" if cited else words)
        pieces.append(child.tail or "")
    return "".join(pieces)
