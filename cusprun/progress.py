"""Progress on stderr: a bar on a terminal, elsewhere a line now and then and one at the end of each task."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
TELL_EVERY_S = 30.0  # where stderr is no terminal


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
    """Iterates ``items`` and shows how far it is, with the remaining time where ``total`` is known."""
    start = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total=total, description=label)
    else:
        told = start
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - told >= TELL_EVERY_S:
                told = now
                left = f" of {total}, {remaining((total - done) * (now - start) / done)} left" if total else ""
                say(f"{label}: {done}{left}")
            yield item
    say(f"{label}: {time.monotonic() - start:.1f} s")


def remaining(seconds: float) -> str:
    """Seconds, or minutes from one and a half on."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
