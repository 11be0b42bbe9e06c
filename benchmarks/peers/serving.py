"""Whether a server under load answers each client as it answers one alone, refuses the rest as promised, and grows.

    python -m cusprun.benchmarks.peers.serving ARTIFACT --clients 64 --seconds 300 --out docs/results/serving

Starts `cusprun-edge serve ARTIFACT`, asks every question once alone, then lets all clients ask at random, half of the
time by streams, some of which they leave in the middle. Writes <out>.json and <out>.md. Exits with 1 where an
answer was wrong, a request failed, or the server did not end well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cusprun.benchmarks.answer_store import artifact_sha256
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.expert_study import given_words
from cusprun.benchmarks.peers.serving_load import Seen, Slope, percentiles, put_load, slope_of, watch_memory
from cusprun.benchmarks.peers.study_page import table_lines
from cusprun.errors import Failed, InvalidRequest, MissingPackage
from cusprun.files import write_json, written_whole
from cusprun.progress import say

SHARED = (
    "Section 1. The tenant shall pay the rent on the first day of each month. Section 2. The landlord shall keep the "
    "roof sound and the heating in order. Section 3. Whoever breaks a window pays for it. Section 4. Notice is given "
    "in writing, three months before the end of a quarter. Section 5. The deposit is three months' rent, and bears "
    "interest. Section 6. Pets other than fish need the landlord's consent, which is not refused without a reason. "
)
PLAIN = ("Name an animal that begins like letter {n} of the alphabet.", "What is {n} plus 17?")
LEAST_SECONDS = 20
READING = ("Which section of these speaks of money? Answer for flat {n}.", "Sum up section {n} of these in one line.")


def questions(count: int) -> list[str]:
    """Half short ones, half that share a beginning of many tokens, so that a server reuses it."""
    forms = (*PLAIN, *(SHARED + form for form in READING))
    return [forms[number % len(forms)].format(n=number // len(forms) + 1) for number in range(count)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole study of one artifact."""
    command = [
        sys.executable, "-P", "-m", "cusprun.cli", "serve", str(options.artifact), "--port", "0", "--name", "served",
        "--queue", str(options.queue), "--parallel", str(options.parallel), "--max-tokens", str(options.max_tokens),
        "--context", str(options.context), *(["--threads", str(options.threads)] if options.threads else []),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise Failed(f"serve ended with {process.wait()} before it answered")
        found = asyncio.run(_load(url, process.pid, options))
        process.send_signal(signal.SIGTERM)
        found["exit_code"] = process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()
    return found


async def _load(url: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    expected = await _ask_alone(url, options)
    say(f"{len(expected)} answers alone; {options.clients} clients for {options.seconds:g} s")
    samples: list[tuple[float, int]] = []
    watching = asyncio.create_task(watch_memory(pid, samples))
    begun = time.monotonic()
    seen = await put_load(
        url, "served", expected, clients=options.clients, seconds=options.seconds, max_tokens=options.max_tokens
    )
    seconds = time.monotonic() - begun
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    again = await _ask_alone(url, options)
    return _figures(seen, seconds, slope_of(samples), samples, again == expected, await _metrics(url))


async def _ask_alone(url: str, options: argparse.Namespace) -> dict[str, str]:
    from openai import AsyncOpenAI

    found = {}
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        for question in questions(options.questions):
            answer = await client.chat.completions.create(
                model="served", messages=[{"role": "user", "content": question}], max_tokens=options.max_tokens,
                temperature=0,
            )  # fmt: skip
            found[question] = answer.choices[0].message.content or ""
    return found


async def _metrics(url: str) -> dict[str, float]:
    import httpx2

    async with httpx2.AsyncClient() as client:
        text = (await client.get(f"{url.removesuffix('/v1')}/metrics")).text
    names = ("generated_tokens", "prompt_tokens", "cached_prompt_tokens", "cancelled")
    found = {name: _sum(text, f"cusprun_{name}_total") for name in names}
    return {**found, "running": _sum(text, "cusprun_running"), "waiting": _sum(text, "cusprun_waiting")}


def _sum(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _figures(
    seen: Seen,
    seconds: float,
    slope: Slope,
    samples: Sequence[tuple[float, int]],
    same: bool,
    metrics: dict[str, float],
) -> dict[str, Any]:
    answered = seen.counts["right"] + seen.counts["wrong"]
    return {
        "seconds": round(seconds, 1),
        "answered": answered,
        "right": seen.counts["right"],
        "wrong": seen.counts["wrong"],
        "wrong_answers": seen.wrong,
        "left_in_the_middle": seen.counts["left"],
        "refused_429": seen.counts["refused"],
        "alone_again_the_same": same,
        "retry_after_s": percentiles(seen.retry_after_s),
        "answer_s": percentiles(seen.whole_s),
        "first_text_s": percentiles(seen.first_s),
        "requests_per_s": round(answered / seconds, 2),
        "rss": asdict(slope),
        "rss_samples": [[round(at, 1), held] for at, held in samples[:: max(1, len(samples) // 60)]],
        "metrics_after": metrics,
    }


def problems_of(found: Mapping[str, Any]) -> list[str]:
    """What was promised and not kept."""
    problems = []
    if found["wrong"]:
        problems.append(f"{found['wrong']} answers differ from those given alone")
    if not found["alone_again_the_same"]:
        problems.append("alone again, the server answers otherwise than before the load")
    if found["metrics_after"]["running"] or found["metrics_after"]["waiting"]:
        problems.append("requests are left in the engine")
    if found["exit_code"] != 0:
        problems.append(f"the server ended with {found['exit_code']}")
    return problems


def page_lines(found: Mapping[str, Any]) -> list[str]:
    """The study as Markdown."""
    settings, rss, metrics = found["settings"], found["rss"], found["metrics_after"]
    low, high = (f"{value / 1e6:+.2f}" for value in rss["ci95"])
    told = "not to be told from nothing" if rss["ci95"][0] <= 0 <= rss["ci95"][1] else "to be told from nothing"
    each = rss["bytes_per_minute"] / 60 / ((found["answered"] + found["refused_429"]) / found["seconds"])
    rows = [
        ("answers", f"{found['answered']} in {found['seconds']:g} s, {found['requests_per_s']:g} a second"),
        ("wrong or mixed", str(found["wrong"])),
        ("refused with 429 and Retry-After", str(found["refused_429"])),
        ("left in the middle by their client", f"{found['left_in_the_middle']} ({metrics['cancelled']:g} cancelled)"),
        ("tokens generated", f"{metrics['generated_tokens']:g}"),
        ("prompt tokens, of which reused", f"{metrics['prompt_tokens']:g}, {metrics['cached_prompt_tokens']:g}"),
        ("memory", f"{rss['first_bytes'] / 1e6:.1f} → {rss['last_bytes'] / 1e6:.1f} MB"),
        ("its slope, MB a minute [95 %]", f"{rss['bytes_per_minute'] / 1e6:+.3f} [{low}, {high}], {told}"),
        ("that is, of each request", f"{each:+.0f} bytes"),
        ("exit code after SIGTERM", str(found["exit_code"])),
    ]
    times = [
        (name, *("" if found[key][cut] is None else f"{found[key][cut]:.2f}" for cut in ("p50", "p95", "p99", "max")))
        for name, key in (("answer", "answer_s"), ("first text", "first_text_s"), ("Retry-After", "retry_after_s"))
    ]
    return [
        "# A server under load",
        "",
        f"`{found['command']}`",
        "",
        f"{settings['artifact']}, {settings['clients']} clients without pause, a queue of {settings['queue']}, "
        f"{settings['parallel']} at once, {settings['questions']} questions with answers of {settings['max_tokens']} "
        f"tokens at most; {found['environment']['cpu']}, {found['environment']['logical_cores']} cores shared by "
        "server and clients. Each answer is held against the one that the same server gave before, alone.",
        "",
        *table_lines([("", ""), *rows]),
        "",
        "Seconds, of requests that were not refused:",
        "",
        *table_lines([("", "median", "95 %", "99 %", "longest"), *times]),
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--questions", type=int, default=32, help="different ones")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("docs/results/serving"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if find_spec("openai") is None:
            raise MissingPackage("openai", "dev", "this study")
        if not options.artifact.exists():
            raise InvalidRequest(
                f"there is no {options.artifact}: name a .gguf file, an ONNX folder or an expert's folder"
            )
        if options.seconds < LEAST_SECONDS:
            raise InvalidRequest(
                f"--seconds {options.seconds:g} is too short for a slope of memory: {LEAST_SECONDS} at least"
            )
        found = measure(options)
    except (InvalidRequest, Failed) as error:
        say(f"serving: {error}")
        return error.exit_code
    names = ("clients", "questions", "max_tokens", "queue", "parallel", "context", "threads")
    settings = {
        "artifact": options.artifact.name,
        "sha256": artifact_sha256(options.artifact),
        "glibc_arenas": os.environ.get("MALLOC_ARENA_MAX"),
        **{name: getattr(options, name) for name in names},
    }
    words = " ".join(["python -m cusprun.benchmarks.peers.serving", *given_words()])
    found = {"settings": settings, "command": words, "environment": environment(), **found}
    write_json(options.out.with_suffix(".json"), found)
    with written_whole(options.out.with_suffix(".md")) as part:
        part.write_text("\n".join(page_lines(found)) + "\n", encoding="utf-8")
    say(f"written: {options.out}.json .md")
    problems = problems_of(found)
    for problem in problems:
        say(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
