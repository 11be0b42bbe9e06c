"""Puts what was measured into report.json: every figure with its unit, its spread and how it was taken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from cusprun import __version__
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.samples import HOW as SAMPLES_HOW
from cusprun.benchmarks.speed import BenchRow, ratios
from cusprun.benchmarks.tally import REMARK, QualityPair
from cusprun.benchmarks.tasks import McResult, paired
from cusprun.errors import InvalidRequest
from cusprun.files import write_json, written_whole

SCHEMA_VERSION = 1
KINDS = ("ffn", "heads", "kv_heads")

UNITS = {
    "prefill_tps": "tokens/s",
    "decode_tps": "tokens/s",
    "ttft_ms": "ms",
    "load_s": "s",
    "peak_rss_bytes": "bytes",
    "rss_before_load_bytes": "bytes",
    "ready_s": "s",
    "load_cold_s": "s",
    "ready_cold_s": "s",
    "avg_ns": "ns",
    "stddev_ns": "ns",
    "samples_s": "s",
    "tps": "tokens/s",
    "kv_bytes_per_token": "bytes/token",
    "weight_bytes": "bytes",
    "tensor_bytes": "bytes",
    "device_bytes": "bytes",
    "copy_bytes_per_s": "bytes/s",
    "bandwidth_bytes_per_s": "bytes/s",
    "bandwidth_share": "share of copy_bytes_per_s",
    "joules_per_token": "J/token",
    "file_bytes": "bytes",
    "parameters": "parameters",
    "macs_per_token": "multiply-accumulates/token",
    "perplexity": "1 (per token)",
    "perplexity_stderr": "1 (per token)",
    "bits_per_byte": "bits/byte",
    "bits_per_byte_increase": "share",
    "bits_per_byte_increase_stderr": "share",
    "kld_mean": "nats/token",
    "top1_agreement": "share",
    "accuracy": "share",
    "stages": "s",
}


class Widths(Protocol):
    """What :class:`cusprun.anatomy.LayerWidths` offers."""

    @property
    def ffn(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...


def build_report(
    *,
    scenario: Mapping[str, Any],
    method: Mapping[str, Any],
    before: Sequence[Widths],
    after: Sequence[Widths],
    speed: Sequence[BenchRow],
    quality: Mapping[str, QualityPair],
    tasks: Mapping[str, tuple[McResult, McResult]],
    corpora: Sequence[Mapping[str, Any]],
    stages: Mapping[str, float],
    proofs: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    frontier: Mapping[str, Any] | None = None,
    score: str = "second-half",
) -> dict[str, Any]:
    """The whole report as JSON.

    ``before`` and ``after`` hold one entry for each layer of the dense model, zeros where one or its attention went.
    ``speed`` holds the expert's row and then the dense one; ``quality`` one pair (expert, dense) per corpus; ``tasks``
    (expert, dense) per question set. ``corpora``: entry, dimension, side (calibration or held-out), documents, tokens,
    licence, attribution, source. ``stages``: seconds by name. ``method``, ``scenario`` and ``proofs`` (one per GGUF:
    path, quant, top1_agreement, kld_mean) go in as they are. ``samples`` are rows of
    :func:`cusprun.benchmarks.samples.sample_answers`, ``frontier`` what `compare` found; each has a key in the report
    only where it is given. Raises InvalidRequest where something is no JSON.
    """
    if len(speed) != 2 or len(before) != len(after):
        raise InvalidRequest(
            f"a report holds the expert's row and the dense one, and for each dense layer the widths before and after; "
            f"got {len(speed)} rows, {len(before)} layers before and {len(after)} after"
        )
    report = {
        "schema_version": SCHEMA_VERSION,
        "cusprun": __version__,
        "measured_at": speed[0].measured_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "scenario": dict(scenario),
        "method": dict(method),
        "environment": {**environment(), "threads": speed[0].threads, "device": speed[0].device},
        "units": UNITS,
        "speed": speed_section(speed[0], speed[1]),
        "quality": quality_section(quality, score),
        "tasks": tasks_section(tasks),
        "layers": layers_section(before, after),
        "corpora": [dict(corpus) for corpus in corpora],
        "proofs": [dict(proof) for proof in proofs],
        "stages": dict(stages),
        **({"samples": [dict(sample) for sample in samples], "samples_how": SAMPLES_HOW} if samples else {}),
        **({"frontier": dict(frontier)} if frontier else {}),
        **({"solved": solved_section(method, speed[0], speed[1])} if method.get("solved") else {}),
    }
    try:
        whole: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a report holds finite numbers, strings, lists and objects only: {error}") from error
    return whole


def speed_section(expert: BenchRow, dense: BenchRow) -> dict[str, Any]:
    """Both rows, their ratios and how they were taken."""
    return {
        "how": (
            f"{len(expert.samples['decode_tps'])} rounds, expert and dense in alternation, a fresh process each with a "
            f"warm-up; prefill: {expert.prefill_tokens} random tokens in one go from an empty cache (llama-bench pp); "
            f"decode: {expert.decode_tokens} random tokens one by one from an empty cache (llama-bench tg); "
            f"ttft: the prompt of {expert.prefill_tokens} tokens read and one token found; load: median, file in the "
            f"page cache; peak RSS: largest of the runs, the Python process included; {expert.threads} threads, "
            f"{expert.runtime}. MACs: every weight matrix once, attention scores left out"
        ),
        "expert": expert.as_json(),
        "dense": dense.as_json(),
        "ratios": ratios(expert, dense),
    }


def solved_section(method: Mapping[str, Any], expert: BenchRow, dense: BenchRow) -> list[dict[str, Any]]:
    """What was wished of the device, predicted before the build and measured after it, by figure.

    ``error`` is the prediction's, as a share of what was measured.
    """
    found = ratios(expert, dense)
    measured = {
        "file_bytes": ("size", expert.file_bytes),
        "peak_rss_bytes": ("ram", expert.peak_rss_bytes),
        "decode_tps": ("tps", expert.decode_tps.mean),
        "speedup": ("speedup", found["decode_tps"]["median_of_pairs"]),
    }
    wished, solved = method.get("budget") or {}, method["solved"]
    return [
        {
            "figure": figure,
            "wish": wished.get(wish),
            "predicted": solved[figure],
            "measured": value,
            "error": solved[figure] / value - 1,
        }
        for figure, (wish, value) in measured.items()
        if figure in solved
    ]


def quality_section(quality: Mapping[str, QualityPair], score: str) -> dict[str, Any]:
    """Per corpus: expert, dense, the increase of bits per byte over dense, and the ratios of the figures.

    Where the vocabularies differ, perplexities have no ratio, and "how" says why.
    """
    corpora = {}
    for name, pair in quality.items():
        entry: dict[str, Any] = {"expert": asdict(pair.artifact)}
        if pair.against is not None:
            entry["dense"] = asdict(pair.against)
            entry["bits_per_byte_increase"] = pair.increase
            entry["bits_per_byte_increase_stderr"] = pair.increase_stderr
            entry["ratios"] = pair.ratios
            entry["same_vocabulary"] = pair.same_vocabulary
            if pair.divergence is not None:
                entry["divergence"] = asdict(pair.divergence)
        corpora[name] = entry
    contexts = sorted({pair.artifact.context for pair in quality.values()})
    same = all(pair.same_vocabulary for pair in quality.values())
    return {
        "how": (
            f"windows of {', '.join(map(str, contexts))} tokens that do not overlap, "
            + ("second half scored, as llama-perplexity does" if score == "second-half" else "every token scored")
            + "; held-out text; perplexity_stderr is perplexity x standard error of the mean loss; "
            "bits_per_byte_increase_stderr is the increase's standard error, paired by window; KL(dense || expert)"
            + ("" if same else f"; {REMARK}; windows are cut in dense's tokens")
        ),
        "score": score,
        "corpora": corpora,
    }


def tasks_section(tasks: Mapping[str, tuple[McResult, McResult]]) -> dict[str, Any]:
    """Per question set: expert, dense, and McNemar's test on both scores."""
    return {
        "how": (
            "multiple choice by the log-likelihood of each answer's text after the prompt (in the chat template where "
            "there is one), plain and per byte of the answer; Wilson 95 % intervals; McNemar's exact test"
        ),
        "sets": {
            name: {
                "expert": expert.as_json(),
                "dense": dense.as_json(),
                "paired": asdict(paired(expert.correct, dense.correct)),
                "paired_normalised": asdict(paired(expert.correct_normalised, dense.correct_normalised)),
            }
            for name, (expert, dense) in tasks.items()
        },
    }


def layers_section(before: Sequence[Widths], after: Sequence[Widths]) -> list[dict[str, Any]]:
    """Per layer and kind: how many there were and how many are left."""
    return [
        {
            "layer": index,
            **{
                kind: {"before": getattr(was, kind), "after": getattr(now, kind)}
                for kind in ("ffn", "heads", "kv_heads")
            },
        }
        for index, (was, now) in enumerate(zip(before, after, strict=True))
    ]


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that expert.json repeats: sizes and speeds with their ratios, quality, accuracy."""
    speed = report["speed"]
    found: dict[str, Any] = {
        key: {
            "expert": speed["expert"][key],
            "dense": speed["dense"][key],
            "ratio": _ratio(speed["ratios"][key]),
            "unit": UNITS[key],
        }
        for key in ("decode_tps", "ttft_ms", "prefill_tps", "load_s", "file_bytes", "peak_rss_bytes", "parameters",
                    "macs_per_token")
    }  # fmt: skip
    found["quality"] = report["quality"]["corpora"]
    found["tasks"] = {
        name: {
            who: {key: entry[who][key] for key in ("n", "accuracy", "accuracy_normalised", "constant_answer_accuracy")}
            for who in ("expert", "dense")
        }
        for name, entry in report["tasks"]["sets"].items()
    }
    return found


def _ratio(ratio: Mapping[str, float]) -> float:
    return ratio["exact"] if "exact" in ratio else ratio["median_of_pairs"]


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes report.json and report.md into ``folder``, each whole or not at all."""
    from cusprun.benchmarks.tables import render_markdown

    write_json(folder / "report.json", report)
    with written_whole(folder / "report.md") as part:
        part.write_text(render_markdown(report), encoding="utf-8")
