"""A bench as the command line asks for it: flags read, everything measured, files written, one document given back."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.sizes import FULL
from cusprun.benchmarks.speed import bench, ratios
from cusprun.corpora.cache import cache_folder
from cusprun.errors import InvalidRequest

UNTIL, MAX_SECONDS = 0.02, 600.0
WHOLE = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Request:
    """The flags of `bench`; numbers in lists as they are typed, None where a flag is not given."""

    artifacts: Sequence[Path]
    against: Path | None = None
    prefill: str | None = None
    decode: str | None = None
    depth: str | None = None
    threads: str | None = None
    repetitions: int | None = None
    until: str | None = None
    max_seconds: float | None = None
    device: str = "cpu"
    csv: Path | None = None
    md: Path | None = None


def measure(request: Request) -> dict[str, Any]:
    """Rows, ratios to ``against``, machine and settings, as `bench --json` prints them; writes csv and md.

    ``ratios`` are the first artifact's at the first number of threads, ``comparisons`` all of them.
    Raises InvalidRequest with every flag that makes no sense.
    """
    wrong: list[str] = []
    lists = {name: _numbers(name, getattr(request, name), wrong) for name in ("prefill", "decode", "depth", "threads")}
    until = _share(request.until, wrong)
    if request.repetitions is not None and request.until is not None:
        wrong.append("--repetitions and --until both say how long to go on: write one of them")
    for name in ("csv", "md"):
        path = getattr(request, name)
        if path is not None and path.is_dir():
            wrong.append(f"--{name} {path} is a folder: name a file")
    if wrong:
        raise InvalidRequest.together(wrong)
    if request.repetitions is None and until is None:
        until = UNTIL
    limit = request.max_seconds if request.max_seconds is not None or request.repetitions is not None else MAX_SECONDS
    paths = [*request.artifacts, *([request.against] if request.against else [])]
    rows = bench(
        paths, prefill=lists["prefill"], decode=lists["decode"], depth=lists["depth"], default=FULL,
        repetitions=request.repetitions, until=until, max_seconds=limit, threads=lists["threads"],
        device=request.device, cold=True, copy=True, kept=cache_folder() / "bench",
    )  # fmt: skip
    dense = {row.threads: row for row in rows if request.against and row.artifact == str(request.against)}
    comparisons = [
        {
            "artifact": row.artifact,
            "against": str(request.against),
            "threads": row.threads,
            "ratios": ratios(row, dense[row.threads]),
        }
        for row in rows if dense and row.artifact != str(request.against)
    ]  # fmt: skip
    found: dict[str, Any] = {
        "rows": [row.as_json() for row in rows],
        "ratios": comparisons[0]["ratios"] if comparisons else None,
        "comparisons": comparisons,
        "environment": environment(),
        "settings": {"until": until, "max_seconds": limit, "repetitions": request.repetitions},
    }
    if request.csv is not None:
        from cusprun.benchmarks.llama_bench import write_csv

        write_csv(request.csv, found["rows"], found["environment"]["cpu"])
    if request.md is not None:
        from cusprun.benchmarks.speed_table import write_page

        write_page(request.md, found, " ".join(["cusprun-edge", *sys.argv[1:]]))
    return found


def _numbers(name: str, text: str | None, wrong: list[str]) -> tuple[int, ...] | None:
    """Whole numbers with commas between them."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(WHOLE.fullmatch(word) for word in words):
        example = "1,2,4" if name == "threads" else "128,512"
        wrong.append(f"--{name} {text}: write whole numbers with commas, such as {example}")
        return None
    return tuple(int(word) for word in words)


def _share(text: str | None, wrong: list[str]) -> float | None:
    """A share such as 2% or 0.02."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        wrong.append(f"--until {text}: write a share such as 2% or 0.02")
        return None
