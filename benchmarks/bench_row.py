"""What a bench says of one artifact at one number of threads: headline, tests, memory and sizes; ratios of two."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cusprun.benchmarks.cost import Cost
from cusprun.benchmarks.sizes import Run, Test
from cusprun.benchmarks.spread import Ratio, Spread


@dataclass(frozen=True)
class TestFigures:
    """One test of one artifact, in llama-bench's words."""

    test: str  # pp512, tg128, tg128 @ d2048
    n_prompt: int
    n_gen: int
    n_depth: int
    context: int  # tokens that the cache had room for
    tps: Spread  # tokens per second
    avg_ns: float  # nanoseconds of one run of the test
    stddev_ns: float
    ttft_ms: float | None  # of a prompt: read and one token found
    peak_rss_bytes: int
    bandwidth_bytes_per_s: float | None  # of a generation: weights and cache read for each token
    bandwidth_share: float | None  # of the machine's copy bandwidth
    joules_per_token: float | None
    samples_s: list[float] = field(default_factory=list)  # of every run, in the order of the rounds

    def rates(self) -> list[float]:
        """Tokens per second of every run."""
        return [(self.n_prompt or self.n_gen) / seconds for seconds in self.samples_s]


@dataclass(frozen=True)
class BenchRow:
    """One artifact's figures, as `bench --json` prints them; the fields from ``tests`` on are missing in old records.

    Headline, load and memory are of the main run: the prompt of prefill_tokens, then decode_tokens at decode_depth.
    """

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
    load_s: float  # median; the files are in the page cache
    peak_rss_bytes: int  # largest over the runs, the Python process included
    rss_before_load_bytes: int  # of that, what Python and the runtime's library take before the model comes
    file_bytes: int
    parameters: int
    macs_per_token: int
    samples: dict[str, list[float]] = field(default_factory=dict)  # every main run, in the order of the rounds
    tests: tuple[TestFigures, ...] = ()
    decode_depth: int = 0
    ready_s: float | None = None  # median; load and the first token
    load_cold_s: float | None = None  # median; the files are read from the disk
    ready_cold_s: float | None = None
    architecture: str | None = None
    tensor_bytes: int | None = None  # of the file, without its header, tokenizer and configuration
    kv_bytes_per_token: int | None = None
    kv_type: str | None = None
    weight_bytes: int | None = None  # read for each token
    copy_bytes_per_s: float | None = None  # the machine's, measured with as many threads
    device_bytes: int | None = None  # of the CUDA device, that were not held before the load
    rounds: int | None = None
    stopped: str | None = None  # why the rounds ended
    measured_at: str | None = None  # start of the last main run, UTC
    notes: tuple[str, ...] = ()  # what could not be measured, and why

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """All runs of one artifact at one number of threads, by what they ran, in the order of the rounds."""

    artifact: str
    threads: int
    device: str
    cost: Cost
    runs: Mapping[Run, list[dict[str, Any]]]  # the main run first
    copy: Mapping[str, Any] | None

    def figures(self) -> tuple[TestFigures, ...]:
        """Every test, those of the main run first."""
        return tuple(
            self._figure(run, test, found) for run, found in self.runs.items() if found for test in run.tests()
        )

    def _figure(self, run: Run, test: Test, found: Sequence[Mapping[str, Any]]) -> TestFigures:
        phase = "prefill" if test.n_prompt else "decode"
        tokens, depth = int(found[0][f"{phase}_tokens"]), int(found[0]["depth"]) if test.n_gen else 0
        seconds = [float(one[f"{phase}_s"]) for one in found]
        nanoseconds = Spread.of([1e9 * value for value in seconds])
        tps = Spread.of([tokens / value for value in seconds])
        joules = [one[f"{phase}_j"] for one in found if one[f"{phase}_j"] is not None]
        read = None
        if test.n_gen:
            cached = depth + (tokens - 1) / 2  # in the middle of the generation
            read = (self.cost.weight_bytes + cached * self.cost.kv_bytes_per_token) * tps.mean
        return TestFigures(
            test=Test(tokens * bool(test.n_prompt), tokens * bool(test.n_gen), depth).name,
            n_prompt=tokens if test.n_prompt else 0,
            n_gen=tokens if test.n_gen else 0,
            n_depth=depth,
            context=int(found[0]["context"]),
            tps=tps,
            avg_ns=nanoseconds.mean,
            stddev_ns=nanoseconds.sd,
            ttft_ms=statistics.fmean(one["ttft_s"] for one in found) * 1e3 if test.n_prompt else None,
            peak_rss_bytes=max(one["peak_rss_bytes"] for one in found),
            bandwidth_bytes_per_s=read,
            bandwidth_share=read / self.copy["bytes_per_s"] if read and self.copy else None,
            joules_per_token=statistics.fmean(joules) / tokens if joules else None,
            samples_s=seconds,
        )

    def row(self, rounds: int, stopped: str) -> BenchRow:
        main = next(iter(self.runs.values()))
        cold = next((found for run, found in self.runs.items() if run.cold), [])
        samples = {
            "prefill_tps": [run["prefill_tokens"] / run["prefill_s"] for run in main],
            "decode_tps": [run["decode_tokens"] / run["decode_s"] for run in main],
            "ttft_ms": [run["ttft_s"] * 1e3 for run in main],
            "load_s": [run["load_s"] for run in main],
            "peak_rss_bytes": [run["peak_rss_bytes"] for run in main],
        }
        really_cold = [run for run in cold if run["cold_note"] is None]
        if cold and len(really_cold) == len(cold):
            samples["load_cold_s"] = [run["load_s"] for run in cold]
        notes = [f"cold load: {note}" for note in sorted({run["cold_note"] for run in cold} - {None})]
        if main[0]["prefill_j"] is None:
            notes.append(f"energy: {main[0]['energy_note']}")
        if self.device == "cuda" and main[0]["device_bytes"] is None:
            notes.append("device memory: install nvidia-ml-py, or torch for CUDA, to have it counted")
        device = [run["device_bytes"] for run in main if run["device_bytes"] is not None]
        return BenchRow(
            artifact=self.artifact,
            format=self.cost.format,
            quant=self.cost.quant,
            runtime=main[0]["runtime"],
            device=self.device,
            threads=self.threads,
            prefill_tokens=main[0]["prefill_tokens"],
            decode_tokens=main[0]["decode_tokens"],
            prefill_tps=Spread.of(samples["prefill_tps"]),
            decode_tps=Spread.of(samples["decode_tps"]),
            ttft_ms=statistics.fmean(samples["ttft_ms"]),
            load_s=statistics.median(samples["load_s"]),
            peak_rss_bytes=max(run["peak_rss_bytes"] for run in main),
            rss_before_load_bytes=max(run["rss_before_load_bytes"] for run in main),
            file_bytes=self.cost.file_bytes,
            parameters=self.cost.parameters,
            macs_per_token=self.cost.macs_per_token,
            samples=samples,
            tests=self.figures(),
            decode_depth=main[0]["depth"],
            ready_s=statistics.median(run["ready_s"] for run in main),
            load_cold_s=statistics.median(run["load_s"] for run in really_cold) if really_cold else None,
            ready_cold_s=statistics.median(run["ready_s"] for run in really_cold) if really_cold else None,
            architecture=self.cost.architecture,
            tensor_bytes=self.cost.tensor_bytes,
            kv_bytes_per_token=self.cost.kv_bytes_per_token,
            kv_type=self.cost.kv_type,
            weight_bytes=self.cost.weight_bytes,
            copy_bytes_per_s=self.copy["bytes_per_s"] if self.copy else None,
            device_bytes=max(device) if device else None,
            rounds=rounds,
            stopped=stopped,
            measured_at=main[-1]["started"],
            notes=tuple(notes),
        )


def ratios(row: BenchRow, dense: BenchRow) -> dict[str, dict[str, Any]]:
    """``row`` divided by ``dense``.

    Measured figures give the fields of :class:`Ratio`, taken within the rounds; sizes give ``exact``; ``tests`` holds
    the ratio of tokens per second of every test that both have. ``decode_yield`` is the decode ratio over what the
    bytes promise (dense bytes / bytes), ``prefill_yield`` the prefill ratio over what the multiplications promise: 1
    means that all of the cut arrives as speed.
    """
    found: dict[str, dict[str, Any]] = {
        key: Ratio.of(samples, dense.samples[key]).as_json()
        for key, samples in row.samples.items()
        if key in dense.samples
    }
    for key in ("file_bytes", "parameters", "macs_per_token"):
        found[key] = {"exact": getattr(row, key) / getattr(dense, key)}
    others = {test.test: test for test in dense.tests}
    found["tests"] = {
        test.test: Ratio.of(test.rates(), others[test.test].rates()).as_json()
        for test in row.tests
        if test.test in others
    }
    decode, prefill = found["decode_tps"]["median_of_pairs"], found["prefill_tps"]["median_of_pairs"]
    found["decode_yield"] = {"median_of_pairs": decode * found["file_bytes"]["exact"]}
    found["prefill_yield"] = {"median_of_pairs": prefill * found["macs_per_token"]["exact"]}
    return found
