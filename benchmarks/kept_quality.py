"""Quality on texts that was measured once, by content hash: an interrupted run goes on with the next text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cusprun.benchmarks.answer_store import AnswerStore, answer_keys, has_store, store_path
from cusprun.benchmarks.quality import Text, evaluate_corpora, join
from cusprun.benchmarks.tally import QualityPair

VERSION = 2  # of what is kept; raised where the same request gives other figures


def evaluate_kept(
    artifact: Path,
    corpora: Mapping[str, Text],
    *,
    against: Path | None = None,
    fresh: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    **settings: Any,
) -> dict[str, QualityPair]:
    """:func:`cusprun.benchmarks.quality.evaluate_corpora`, a text at a time, each kept as soon as it is measured.

    A text that the same files were measured on before, in the same way by the same runtimes, is not measured again
    unless ``fresh``. ``settings`` are those of evaluate_corpora; it raises what that raises.
    """
    other = None if against is None else answer_keys(against, [{}], device)[0]
    requests = [
        {"quality": VERSION, "text": _digest(text), "against": other, "settings": settings} for text in corpora.values()
    ]
    keys = dict(zip(corpora, answer_keys(artifact, requests, device), strict=True))
    found = {}
    for name, text in corpora.items():
        value = None if fresh else _find(keys[name])
        if value is None:
            value = asdict(
                evaluate_corpora(artifact, {name: text}, against=against, threads=threads, device=device, **settings)[
                    name
                ]
            )
            with AnswerStore(store_path()) as store:
                store.put(keys[name], value)
        found[name] = QualityPair.of(value)
    return found


def _find(key: str) -> Any:
    """What is kept of a text; a store is made where something is to be kept, so that what is refused leaves none."""
    if not has_store():
        return None
    with AnswerStore(store_path()) as store:
        return store.get(key)


def _digest(text: Text) -> str:
    return hashlib.sha256(join(text).encode("utf-8", "surrogatepass")).hexdigest()
