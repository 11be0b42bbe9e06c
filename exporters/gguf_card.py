"""What a model folder's own card says of it: the front matter of README.md, in the keys of :mod:`gguf_metadata`.

The card comes from outside: only its first bytes are read, every value is text of bounded length, and what is of
another form is left out with a line that says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cusprun.progress import say

LONGEST_CARD = 65536  # bytes that are read
LONGEST_VALUE = 256  # characters
MOST_VALUES = 64  # of a list
# Keys of the Hugging Face card -> ours, and whether a list is meant.
KEYS = {
    "license": ("license", False),
    "license_name": ("license_name", False),
    "license_link": ("license_link", False),
    "language": ("languages", True),
    "tags": ("tags", True),
    "pipeline_tag": ("tags", True),
    "datasets": ("datasets", True),
    "base_model": ("base_model", True),
}


def read_card(folder: Path) -> dict[str, str | list[str]]:
    """The metadata in the front matter of ``folder``'s README.md; empty where there is none that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        text = file.read(LONGEST_CARD).decode("utf-8", errors="replace").replace("\r\n", "\n")
    begin, closed, _ = text.removeprefix("\ufeff").partition("\n---")
    if not begin.startswith("---\n"):
        return {}
    if not closed:
        say(f"{card}: its front matter does not end within {LONGEST_CARD} bytes and is left out")
        return {}
    try:
        # All scalars as the text they are: the language no is no boolean.
        values = yaml.load(begin[4:], Loader=yaml.BaseLoader)  # noqa: S506 (BaseLoader makes nothing but text)
    except (yaml.YAMLError, RecursionError):
        values = None
    if not isinstance(values, dict):
        say(f"{card}: its front matter is no YAML mapping and is left out")
        return {}
    found: dict[str, str | list[str]] = {}
    for key, (ours, many) in KEYS.items():
        if key not in values:
            continue
        given = values[key]
        texts = _texts(given if many and isinstance(given, list) else [given])
        if texts is None:
            form = f"a text or a list of at most {MOST_VALUES}" if many else "a text"
            say(f"{card}: {key} is left out: it is not {form}, of at most {LONGEST_VALUE} characters each")
        elif many:
            before = found.get(ours, [])
            found[ours] = [*before, *(text for text in texts if text not in before)]
        elif texts:
            found[ours] = texts[0]
    return {key: value for key, value in found.items() if value}


def _texts(values: list[Any]) -> list[str] | None:
    """The values, empty ones left out; None where one is no line of text or there are too many."""
    if len(values) > MOST_VALUES:
        return None
    for value in values:
        if not isinstance(value, str) or len(value) > LONGEST_VALUE or not value.replace("\t", " ").isprintable():
            return None
    return [value.strip() for value in values if value.strip()]
