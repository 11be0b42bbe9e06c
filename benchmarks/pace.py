"""When a bench has measured enough, and how long it will still take; both shown while it runs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from cusprun.benchmarks.spread import Ratio, Spread
from cusprun.progress import TELL_EVERY_S, remaining, say

LEAST_ROUNDS = 10  # before a standard error is believed: stopping at the first small one takes luck for precision


@dataclass(frozen=True)
class Pace:
    """``rounds``, or as many as bring every relative standard error below ``until``; at most ``max_seconds``.

    Of several artifacts the errors of their ratios are to be below half of that, so that a difference of 5 % is told
    from none at the usual 2 %: an interval of some 2.3 errors on either side, and the luck of the estimate.
    """

    rounds: int | None
    until: float | None = None
    max_seconds: float | None = None
    paired: bool = False  # several artifacts: rounds forwards and backwards are equally many

    def problems(self) -> list[str]:
        """What cannot be kept to, each with what to write instead."""
        found = []
        if self.rounds is not None and self.rounds < 1:
            found.append(f"--repetitions {self.rounds}: write 1 or more")
        if self.until is not None and not 0 < self.until < 1:
            found.append(f"--until {self.until:g}: write a share between 0 and 1, such as 2%")
        if self.max_seconds is not None and not self.max_seconds > 0:
            found.append(f"--max-seconds {self.max_seconds:g}: write more than 0")
        return found

    def stop(self, done: int, seconds: float, errors: Sequence[float]) -> str | None:
        """Why no further round is run after ``done`` that took ``seconds``; None where one is.

        ``errors``: as :func:`errors_of` gives them.
        """
        if self.rounds is not None and done >= self.rounds:
            return f"{_rounds(done)}, as asked"
        worst = max(errors, default=math.inf)
        if self.until is not None and worst < self.until and done >= LEAST_ROUNDS and not (self.paired and done % 2):
            return f"every standard error below {self.until:.1%} after {done} rounds"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            error = f"largest standard error {worst:.1%}" if worst < math.inf else "one round tells no error"
            return f"time limit of {self.max_seconds:.0f} s after {_rounds(done)}; {error}"
        return None

    def left_s(self, done: float, seconds: float, errors: Sequence[float]) -> float:
        """Seconds that the rest will take as things stand: errors fall with the root of the rounds.

        ``done`` rounds, more than none, that took ``seconds``; of the round at hand the share that is done.
        """
        wanted = float(self.rounds or LEAST_ROUNDS)
        worst = max(errors, default=math.inf)
        if self.until is not None and worst < math.inf:
            wanted = max(wanted, done * (worst / self.until) ** 2)
        left = (wanted - done) * seconds / done
        return max(0.0, left if self.max_seconds is None else min(left, self.max_seconds - seconds))


def errors_of(tests: Sequence[Spread], ratios: Sequence[Ratio] = ()) -> list[float]:
    """What is held against ``until``: relative standard errors of the tests, twice those of ratios; inf if unknown."""
    doubled = (math.inf if ratio.stderr is None else 2 * ratio.stderr for ratio in ratios)
    return [*(test.relative_error for test in tests), *doubled]


class Show(Protocol):
    """Shows how far it is: ``done`` seconds of work, ``left`` seconds, and what is known so far."""

    def __call__(self, done: float, left: float | None, text: str) -> None: ...


@contextmanager
def shown(label: str) -> Iterator[Show]:
    """A bar on a terminal, elsewhere a line now and then; one quiet line at the end."""
    start = told = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None, note="")

            def draw(done: float, left: float | None, text: str) -> None:
                total = None if left is None else done + left
                bar.update(task, completed=done, total=total, note=_note(left, text))

            yield draw
    else:

        def tell(done: float, left: float | None, text: str) -> None:
            nonlocal told
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                say(f"{label}: {_note(left, text)}")

        yield tell
    say(f"{label}: {time.monotonic() - start:.1f} s")


def _rounds(number: int) -> str:
    return f"{number} round{'s' if number > 1 else ''}"


def _note(left: float | None, text: str) -> str:
    if left is None:
        return text
    return f"{text}, {remaining(left)} left"
