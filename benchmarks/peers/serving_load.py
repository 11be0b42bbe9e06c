"""Many clients at once on a running server: what each was answered, how long it took, what the process came to hold."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SAMPLE_SECONDS = 0.5
BLOCKS = 10  # of the memory samples: neighbours are alike, and their blocks less so
WARM_UP = 0.2  # share of the run before memory counts
LEAVING = 1 / 16  # share of the streams that their client leaves in the middle


@dataclass
class Seen:
    """What all clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    whole_s: list[float] = field(default_factory=list)  # of answered requests, from sending to the last token
    first_s: list[float] = field(default_factory=list)  # of streams, to the first text
    retry_after_s: list[int] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Slope:
    """Growth of memory, in bytes a minute, with Student's 95 % interval over blocks of samples."""

    bytes_per_minute: float
    ci95: tuple[float, float]
    first_bytes: int
    last_bytes: int
    samples: int


async def put_load(
    url: str, model: str, expected: Mapping[str, str], *, clients: int, seconds: float, max_tokens: int, seed: int = 0
) -> Seen:
    """``clients`` ask the questions of ``expected`` for ``seconds`` and hold each answer against the one there."""
    from openai import AsyncOpenAI

    seen = Seen()
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        until = time.monotonic() + seconds
        work = (_Client(client, model, expected, max_tokens, seen, seed + number) for number in range(clients))
        await asyncio.gather(*(one.run(until) for one in work))
    return seen


class _Client:
    """One of them: it asks, waits where it is told to, asks again."""

    def __init__(
        self, client: Any, model: str, expected: Mapping[str, str], max_tokens: int, seen: Seen, seed: int
    ) -> None:
        self._client, self._expected, self._seen = client, expected, seen
        self._asked = {"model": model, "max_tokens": max_tokens, "temperature": 0}
        self._chance = random.Random(seed)

    async def run(self, until: float) -> None:
        from openai import RateLimitError

        questions = list(self._expected)
        while time.monotonic() < until:
            question = self._chance.choice(questions)
            begun = time.monotonic()
            try:
                if self._chance.random() < 0.5:
                    await self._whole(question, begun)
                else:
                    await self._stream(question, begun, leave=self._chance.random() < LEAVING)
            except RateLimitError as refusal:
                self._seen.counts["refused"] += 1
                wait = int(refusal.response.headers["retry-after"])
                self._seen.retry_after_s.append(wait)
                await asyncio.sleep(min(wait, max(0.0, until - time.monotonic())))

    async def _whole(self, question: str, begun: float) -> None:
        messages = [{"role": "user", "content": question}]
        found = await self._client.chat.completions.create(messages=messages, **self._asked)
        self._judge(question, found.choices[0].message.content, begun)

    async def _stream(self, question: str, begun: float, *, leave: bool) -> None:
        messages = [{"role": "user", "content": question}]
        text, first = "", True
        async with await self._client.chat.completions.create(messages=messages, stream=True, **self._asked) as chunks:
            async for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                if text and first:
                    first = False
                    self._seen.first_s.append(time.monotonic() - begun)
                    if leave:
                        self._seen.counts["left"] += 1
                        return
        self._judge(question, text, begun)

    def _judge(self, question: str, text: str, begun: float) -> None:
        self._seen.whole_s.append(time.monotonic() - begun)
        if text == self._expected[question]:
            self._seen.counts["right"] += 1
            return
        self._seen.counts["wrong"] += 1
        if len(self._seen.wrong) < 20:
            self._seen.wrong.append({"question": question, "expected": self._expected[question], "answer": text})


async def watch_memory(pid: int, samples: list[tuple[float, int]]) -> None:
    """Appends seconds and resident bytes of a process, until it is cancelled."""
    import psutil

    process, begun = psutil.Process(pid), time.monotonic()
    while True:
        samples.append((time.monotonic() - begun, process.memory_info().rss))
        await asyncio.sleep(SAMPLE_SECONDS)


def slope_of(samples: Sequence[tuple[float, int]]) -> Slope:
    """The growth after the warm-up; ``samples`` are seconds and bytes. Raises ValueError on fewer than 2 a block."""
    from scipy import stats

    late = [sample for sample in samples if sample[0] >= WARM_UP * samples[-1][0]]
    if len(late) < 2 * BLOCKS:
        raise ValueError(f"{len(late)} samples of memory are too few for a slope: run longer")
    seconds, held = (np.array([block.mean() for block in np.array_split(axis, BLOCKS)]) for axis in np.array(late).T)
    fit = stats.linregress(seconds, held)
    half = float(stats.t.ppf(0.975, BLOCKS - 2)) * fit.stderr
    per_minute = 60 * float(fit.slope)
    return Slope(per_minute, (per_minute - 60 * half, per_minute + 60 * half), late[0][1], late[-1][1], len(late))


def percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """Median, 95th and 99th percentile, largest and number."""
    if len(values) < 2:
        return {"p50": None, "p95": None, "p99": None, "max": None, "n": len(values)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}
    return {**{name: round(value, 4) for name, value in found.items()}, "n": len(values)}
