"""French codes as the npm package legi-data keeps them: a tree of sections and articles in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

from cusprun.corpora.parsers import Draft, Members, Options
from cusprun.corpora.text import clean


def parse_statutes(members: Members, options: Options) -> Iterator[Draft]:
    """One draft per section that holds articles in force. Options: ``every`` keeps every n-th section (1)."""
    every = options.get("every", 1)
    for name, data in members:
        for number, section in enumerate(_sections(json.loads(data))):
            key, text = section
            if number % every == 0 and len(text) >= 400:
                yield Draft(f"{name.rsplit('/', 1)[-1].removesuffix('.json')}/{key}", text)


def _sections(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    data, children = node.get("data", {}), node.get("children", ())
    articles = [child["data"] for child in children if child["type"] == "article"]
    articles = [article for article in articles if article.get("etat") == "VIGUEUR" and article.get("texte")]
    if articles:
        lines = [str(data.get("title", ""))]
        lines += [
            f"Article {article['num']}\n{_plain(article.get('texteHtml') or article['texte'])}"
            for article in articles
            if article.get("num")
        ]
        yield str(data.get("cid", "")), clean("\n\n".join(lines))
    for child in children:
        if child["type"] != "article":
            yield from _sections(child)


def _plain(markup: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(br|/p)\s*/?>", "\n", markup)))
