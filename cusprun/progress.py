"""Progress on stderr: a bar on a terminal, one quiet line at the end of each task elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def say(message: str) -> None:
    """One line on stderr; stdout belongs to results."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def stdout_aside() -> Iterator[None]:
    """Drops what native code writes to stdout meanwhile: it belongs to results."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterates ``items`` and shows how far it is, with the remaining time on a terminal."""
    start = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total=total, description=label)
    else:
        yield from items
    say(f"{label}: {time.monotonic() - start:.1f} s")
