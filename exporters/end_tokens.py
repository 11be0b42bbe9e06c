"""The tokens that end an answer, out of all the places where a model folder names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cusprun.errors import InvalidRequest


def read_end_tokens(folder: Path, own: int | None, rows: int) -> list[int]:
    """Ids that end an answer, each once: the tokenizer's ``own`` first, then those of generation_config.json, or of
    config.json where that names none.

    A lone id that a smaller tokenizer left behind is passed over. Raises InvalidRequest where a file names what is no
    id, or a list holds one of no token of a model of ``rows`` tokens.
    """
    ends = [] if own is None or own >= rows else [own]
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        found = _named(path, rows)
        if wrong := [end for end in found if type(end) is not int or not 0 <= end < rows]:
            raise InvalidRequest(f"{path}: eos_token_id holds {wrong[0]!r:.60}, which is no token of this model")
        if found:
            return list(dict.fromkeys([*ends, *found]))
    return ends


def _named(path: Path, rows: int) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InvalidRequest(f"{path} is not a JSON object: {error}") from error
    if isinstance(value, list):
        return value
    return [] if value is None or (type(value) is int and not 0 <= value < rows) else [value]
