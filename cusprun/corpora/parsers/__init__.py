"""From a package's members to drafts of documents; one file per kind of content.

A parser is ``parse(members, options)``: an iterator of (name, bytes) and the catalog's options in, drafts out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cusprun.corpora.document import Question
from cusprun.errors import Failed
from cusprun.runtimes import Message

VERSION = 5  # raise it when what any parser yields changes: documents read by older code are read again

Members = Iterator[tuple[str, bytes]]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """A document before it is tagged. ``key`` is stable within its entry; long ``text`` is cut later.

    ``group`` names what the text was taken from where several drafts come from one (a paper); they share a side.
    """

    key: str
    text: str
    turns: tuple[Message, ...] = ()
    question: Question | None = None
    group: str = ""


Parser = Callable[[Members, Options], Iterator[Draft]]

PARSERS = {
    "plain": "plain:parse_plain",
    "code": "plain:parse_code",
    "sayings": "plain:parse_sayings",
    "choices": "chat:parse_choices",
    "pairs": "chat:parse_pairs",
    "field": "chat:parse_field",
    "papers": "papers:parse_papers",
    "abstracts": "papers:parse_abstracts",
    "book": "books:parse_book",
    "headings": "books:parse_headings",
    "faq": "books:parse_faq",
    "parallel-book": "books:parse_parallel",
    "declaration": "declarations:parse_declaration",
    "parallel-declaration": "declarations:parse_parallel",
    "statutes": "statutes:parse_statutes",
}


def find_parser(name: str) -> Parser:
    """The parser of this name. Raises Failed where the catalog names one that does not exist."""
    if name not in PARSERS:
        raise Failed(f"the catalog names the parser {name!r}; there are {', '.join(PARSERS)}")
    module, function = PARSERS[name].split(":")
    parser: Parser = getattr(importlib.import_module(f"cusprun.corpora.parsers.{module}"), function)
    return parser


def pair(key: str, asked: str, answered: str, group: str = "") -> Draft:
    """A draft of one question and its answer."""
    turns = (Message("user", asked), Message("assistant", answered))
    return Draft(key, f"{asked}\n\n{answered}", turns, group=group)
