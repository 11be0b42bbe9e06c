"""Plain text files, one document each, and programming problems with their solutions."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
from collections.abc import Iterator

from cusprun.corpora.parsers import Draft, Members, Options, pair
from cusprun.corpora.text import clean, language_of
from cusprun.errors import Failed

LIMIT = 32 * 2**20  # bytes that a gzipped member may unpack to


def parse_plain(members: Members, options: Options) -> Iterator[Draft]:
    """One draft per file. Options: ``language`` keeps files in that language only; ``unwrap`` joins hard-wrapped lines;
    ``shortest`` is the least number of characters (200)."""
    for name, data in members:
        text = clean(data.decode("utf-8", "replace"))
        if options.get("unwrap"):
            text = unwrap(text)
        if len(text) < options.get("shortest", 200):
            continue
        if options.get("language") and language_of(text) != options["language"]:
            continue
        yield Draft(name.rsplit("/", 1)[-1].removesuffix(".txt"), text)


def unwrap(text: str) -> str:
    """Joins lines within a paragraph that were broken at a fixed width; lists and headings stay apart."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        joined = lines[:1]
        for before, line in itertools.pairwise(lines):
            if len(before) >= 50 and not re.match(r"([-*•·]|\(?\w{1,3}[.)])\s", line):
                joined[-1] += f" {line}"
            else:
                joined.append(line)
        paragraphs.append("\n".join(joined))
    return "\n\n".join(paragraphs)


def parse_code(members: Members, options: Options) -> Iterator[Draft]:
    """Rows {"task_id", "prompt", "canonical_solution"} of a jsonl.gz: the problem asked, the function answered."""
    for name, data in members:
        with gzip.open(io.BytesIO(data)) as stream:
            unpacked = stream.read(LIMIT + 1)
        if len(unpacked) > LIMIT:
            raise Failed(f"{name} unpacks to more than {LIMIT // 2**20} MiB; it is not read")
        for line in unpacked.decode("utf-8").splitlines():
            row = json.loads(line)
            problem = row["prompt"].strip("\n")
            yield pair(
                row["task_id"], f"Complete this function.\n\n{problem}", problem + "\n" + row["canonical_solution"]
            )


def parse_sayings(members: Members, options: Options) -> Iterator[Draft]:
    """Files of short sayings between lines of "%", as fortune(6) reads them; neighbours make one draft of a page."""
    for name, data in members:
        stem, page, number = name.rsplit("/", 1)[-1], "", 0
        for saying in clean(data.decode("utf-8", "replace")).split("\n%\n"):
            page = f"{page}\n\n{saying.strip()}".strip()
            if len(page) >= 1500:
                yield Draft(f"{stem}/{number}", page)
                page, number = "", number + 1
        if page:
            yield Draft(f"{stem}/{number}", page)
