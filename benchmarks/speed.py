"""Speed and memory of artifacts as they ship: each run in a fresh process, the artifacts in alternation.

A machine drifts (heat, neighbours), so the ratio of two artifacts is taken within each round, and every other round
goes through the artifacts backwards. Rounds go on until every standard error is small enough, or for a time, or for a
number of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cusprun.benchmarks import bandwidth, page_cache, run_once
from cusprun.benchmarks.answer_store import artifact_sha256
from cusprun.benchmarks.bench_row import BenchRow, Measured, ratios
from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.journal import Journal
from cusprun.benchmarks.pace import Pace, errors_of, shown
from cusprun.benchmarks.sizes import MAIN, Run, Sizes, choose
from cusprun.benchmarks.spread import Ratio, Spread
from cusprun.errors import InvalidRequest
from cusprun.progress import say
from cusprun.runtimes import default_threads
from cusprun.runtimes.child import run_in_child

__all__ = ["BenchRow", "Spread", "bench", "order", "ratios"]

RUN_TIMEOUT_S = 1800.0


def bench(
    artifacts: Sequence[Path],
    *,
    prefill: int | Sequence[int] | None = None,
    decode: int | Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    default: Sizes = MAIN,
    repetitions: int | None = 5,
    until: float | None = None,
    max_seconds: float | None = None,
    threads: int | Sequence[int] | None = None,
    device: str = "cpu",
    cold: bool = False,
    copy: bool = False,
    slowdowns: Sequence[float] | None = None,
    kept: Path | None = None,
) -> list[BenchRow]:
    """One row for each number of threads and .gguf file, ONNX or model folder, in the order given.

    Sizes that are not given are those of ``default`` as far as every artifact's context holds them.
    ``repetitions`` rounds are run, or with ``until`` (a share) as many as bring every test's standard error below it;
    ``max_seconds`` ends both after the round at hand. ``threads`` defaults to the physical cores that this process
    may use; a virtual machine may report them wrongly. ``cold`` adds loads from the disk, ``copy`` the machine's own
    copy bandwidth. ``slowdowns``, one for each artifact, let its calls take that share longer (run_once.measure): a
    check of the bench itself. With ``kept``, a folder, an interrupted bench goes on when it is asked for again.
    Raises InvalidRequest for numbers below 1 or a path that is no artifact, Failed where a run crashed.
    """
    asked = {"prefill": _listed(prefill), "decode": _listed(decode), "depth": _listed(depth)}
    counts = tuple(dict.fromkeys(_listed(threads) or (default_threads(),)))
    pace = Pace(repetitions if until is None else None, until, max_seconds, paired=len(artifacts) > 1)
    wrong = replace(default, **{name: values for name, values in asked.items() if values is not None}).problems()
    wrong += pace.problems() + [f"--threads {count}: write 1 or more" for count in counts if count < 1]
    if not artifacts:
        wrong.append("nothing to measure: name a .gguf file or a model folder")
    if len(set(artifacts)) < len(artifacts):
        wrong.append("an artifact is named twice: it cannot be held against itself")
    if wrong:
        raise InvalidRequest.together(wrong)
    costs = [cost(artifact) for artifact in artifacts]
    contexts = {path.name: price.context for path, price in zip(artifacts, costs, strict=True)}
    runs = choose(asked, default, contexts).runs()
    if cold:
        runs.append(Run(context=runs[0].context, cold=True))
    shares = tuple(slowdowns or [0.0] * len(artifacts))
    plan = _Bench(tuple(artifacts), counts, tuple(runs), device, shares)
    journal = Journal(kept, [[artifact_sha256(path) for path in artifacts], plan.asked(), copy]) if kept else None
    try:
        copies = {count: plan.once(journal, f"copy {count}", bandwidth.measure_copy, count) for count in counts if copy}
        measured = {
            (count, index): Measured(
                str(path), count, device, costs[index], {run: [] for run in runs}, copies.get(count)
            )
            for count in counts for index, path in enumerate(artifacts)
        }  # fmt: skip
        rounds, stopped = plan.run(measured, pace, journal)
        if journal is not None:
            journal.finish()
    finally:
        if journal is not None:
            journal.close()
    return [found.row(rounds, stopped) for found in measured.values()]


class _Bench:
    """The runs of one bench, each in a process of its own."""

    def __init__(
        self,
        artifacts: tuple[Path, ...],
        threads: tuple[int, ...],
        runs: tuple[Run, ...],
        device: str,
        slowdowns: tuple[float, ...],
    ) -> None:
        self.artifacts, self.threads, self.runs, self.device = artifacts, threads, runs, device
        self.slowdowns = slowdowns

    def asked(self) -> list[Any]:
        """What tells one bench of the same artifacts from another."""
        return [self.threads, [asdict(run) for run in self.runs], self.device, self.slowdowns]

    def run(self, measured: dict[tuple[int, int], Measured], pace: Pace, journal: Journal | None) -> tuple[int, str]:
        """Fills ``measured`` round by round; how many there were and why they ended."""
        if journal is not None and journal.kept:
            say(f"going on after {journal.kept} runs that an interrupted bench has done")
        for note in {page_cache.renew(page_cache.files_of(path)) for path in self.artifacts} - {None}:
            say(f"files lie in memory as they were written or read: {note}")
        seconds, rounds, text = 0.0, 0, "first round"
        stopped: str | None = None
        errors: list[float] = []
        in_a_round = len(list(self.round(0)))
        with shown("speed") as show:
            while stopped is None:
                for done, (count, run, index) in enumerate(self.round(rounds), 1):
                    name = f"{rounds} {count} {run} {index}"
                    found = self.once(
                        journal, name, run_once.measure, str(self.artifacts[index]), **asdict(run), threads=count,
                        device=self.device, seed=rounds, slowdown=self.slowdowns[index],
                    )  # fmt: skip
                    measured[count, index].runs[run].append(found)
                    if run.cold:  # which has left the file as loading reads it
                        page_cache.renew(page_cache.files_of(self.artifacts[index]))
                    seconds += found["seconds"]
                    show(seconds, pace.left_s(rounds + done / in_a_round, seconds, errors), text)
                rounds += 1
                errors = self.errors(measured)
                worst = max(errors)
                text = f"{rounds} rounds, standard errors up to {worst:.1%}" if rounds > 1 else "1 round"
                stopped = pace.stop(rounds, seconds, errors)
        return rounds, stopped

    def errors(self, measured: Mapping[tuple[int, int], Measured]) -> list[float]:
        """How far the tests, and their ratios to the last artifact's, are from being known."""
        figures = {key: found.figures() for key, found in measured.items()}
        last = len(self.artifacts) - 1
        pairs = [
            Ratio.of(test.rates(), other.rates())
            for (count, index), tests in figures.items() if index != last
            for test, other in zip(tests, figures[count, last], strict=True)
        ]  # fmt: skip
        return errors_of([test.tps for tests in figures.values() for test in tests], pairs)

    def round(self, number: int) -> Iterator[tuple[int, Run, int]]:
        """Threads, sizes and artifact of one round's runs; those that are held together follow one another."""
        for count in self.threads:
            for run in self.runs:
                for index in order(len(self.artifacts), number):
                    yield count, run, index

    def once(
        self, journal: Journal | None, name: str, function: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``function`` finds in a fresh process, with its seconds and its start; or what was kept of it."""
        kept = journal.find(name) if journal is not None else None
        if kept is not None:
            return kept
        started, start = datetime.now(UTC), time.monotonic()
        found: dict[str, Any] = run_in_child(function, *args, **kwargs, timeout=RUN_TIMEOUT_S)
        found |= {"seconds": time.monotonic() - start, "started": started.isoformat(timespec="seconds")}
        if journal is not None:
            journal.add(name, found)
        return found


def order(artifacts: int, number: int) -> list[int]:
    """The artifacts in one round: every other one goes backwards."""
    return list(range(artifacts))[:: 1 if number % 2 == 0 else -1]


def _listed(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return (value,) if isinstance(value, int) else None if value is None else tuple(value)
