"""Speed and memory of artifacts as they ship: each run in a fresh process, the artifacts in alternation.

A machine drifts (heat, neighbours), so the ratio of two artifacts is taken within each round as well as of the means,
and every other round goes through the artifacts backwards.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cusprun.benchmarks import run_once
from cusprun.benchmarks.cost import cost
from cusprun.errors import InvalidRequest
from cusprun.progress import track
from cusprun.runtimes import default_threads
from cusprun.runtimes.child import run_in_child

RUN_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of ``n`` runs."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class BenchRow:
    """One artifact's figures, as `bench --json` prints them."""

    artifact: str
    format: str
    quant: str
    runtime: str
    device: str
    threads: int
    prefill_tokens: int
    decode_tokens: int
    prefill_tps: Spread  # tokens per second, llama-bench's pp
    decode_tps: Spread  # tokens per second, llama-bench's tg
    ttft_ms: float  # mean; the prompt of prefill_tokens read and one token found, model loaded and warm
    load_s: float  # median; the file may be in the page cache
    peak_rss_bytes: int  # largest over the runs, the Python process included
    rss_before_load_bytes: int  # of that, what Python and the runtime's library take before the model comes
    file_bytes: int
    parameters: int
    macs_per_token: int
    samples: dict[str, list[float]] = field(default_factory=dict)  # every run, in the order of the rounds

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return asdict(self)


def bench(
    artifacts: Sequence[Path],
    *,
    prefill: int = 512,
    decode: int = 128,
    repetitions: int = 5,
    threads: int | None = None,
    device: str = "cpu",
) -> list[BenchRow]:
    """One row for each .gguf file or model folder, in the order given.

    ``threads`` defaults to the physical cores that this process may use; a virtual machine may report them wrongly.
    Raises InvalidRequest for numbers below 1 or a path that is no artifact, Failed where a run crashed.
    """
    settings = {"prefill": prefill, "decode": decode, "repetitions": repetitions, "threads": threads or 1}
    wrong = [f"{name} {value}: write 1 or more" for name, value in settings.items() if value < 1]
    if not artifacts:
        wrong.append("nothing to measure: name a .gguf file or a model folder")
    if len(set(artifacts)) < len(artifacts):
        wrong.append("an artifact is named twice: it cannot be held against itself")
    if wrong:
        raise InvalidRequest.together(wrong)
    costs = [cost(artifact) for artifact in artifacts]
    used = threads or default_threads()
    runs: list[list[dict[str, Any]]] = [[] for _ in artifacts]
    schedule = rounds(len(artifacts), repetitions)
    for index in track(schedule, f"speed, {repetitions} rounds", total=len(schedule)):
        found = run_in_child(
            run_once.measure,
            str(artifacts[index]),
            prefill=prefill,
            decode=decode,
            threads=used,
            device=device,
            seed=len(runs[index]),
            timeout=RUN_TIMEOUT_S,
        )
        runs[index].append(found)
    rows = []
    for artifact, price, measured in zip(artifacts, costs, runs, strict=True):
        samples = {
            "prefill_tps": [run["prefill_tokens"] / run["prefill_s"] for run in measured],
            "decode_tps": [run["decode_tokens"] / run["decode_s"] for run in measured],
            "ttft_ms": [run["ttft_s"] * 1e3 for run in measured],
            "load_s": [run["load_s"] for run in measured],
            "peak_rss_bytes": [run["peak_rss_bytes"] for run in measured],
        }
        row = BenchRow(
            artifact=str(artifact),
            format=price.format,
            quant=price.quant,
            runtime=measured[0]["runtime"],
            device=device,
            threads=used,
            prefill_tokens=measured[0]["prefill_tokens"],
            decode_tokens=measured[0]["decode_tokens"],
            prefill_tps=Spread.of(samples["prefill_tps"]),
            decode_tps=Spread.of(samples["decode_tps"]),
            ttft_ms=statistics.fmean(samples["ttft_ms"]),
            load_s=statistics.median(samples["load_s"]),
            peak_rss_bytes=max(run["peak_rss_bytes"] for run in measured),
            rss_before_load_bytes=max(run["rss_before_load_bytes"] for run in measured),
            file_bytes=price.file_bytes,
            parameters=price.parameters,
            macs_per_token=price.macs_per_token,
            samples=samples,
        )
        rows.append(row)
    return rows


def rounds(artifacts: int, repetitions: int) -> list[int]:
    """The order of the runs: every artifact once a round, every other round backwards."""
    order = list(range(artifacts))
    return [index for round_ in range(repetitions) for index in (order if round_ % 2 == 0 else order[::-1])]


def ratios(row: BenchRow, dense: BenchRow) -> dict[str, dict[str, float]]:
    """``row`` divided by ``dense``.

    Measured figures give ``of_means``, ``median_of_pairs`` (the two runs of one round) and ``pairs``; sizes give
    ``exact``. ``decode_yield`` is the decode ratio over what the bytes promise (dense bytes / bytes), ``prefill_yield``
    the prefill ratio over what the multiplications promise: 1 means that all of the cut arrives as speed.
    """
    found: dict[str, dict[str, float]] = {}
    for key, samples in row.samples.items():
        pairs = [one / other for one, other in zip(samples, dense.samples[key], strict=True)]
        found[key] = {
            "of_means": statistics.fmean(samples) / statistics.fmean(dense.samples[key]),
            "median_of_pairs": statistics.median(pairs),
            "pairs": len(pairs),
        }
    for key in ("file_bytes", "parameters", "macs_per_token"):
        found[key] = {"exact": getattr(row, key) / getattr(dense, key)}
    decode, prefill = found["decode_tps"]["median_of_pairs"], found["prefill_tps"]["median_of_pairs"]
    found["decode_yield"] = {"median_of_pairs": decode * found["file_bytes"]["exact"]}
    found["prefill_yield"] = {"median_of_pairs": prefill * found["macs_per_token"]["exact"]}
    return found
