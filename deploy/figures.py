"""What was measured of an expert in the type that is shipped, out of its report; nothing where it was not measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cusprun.deploy.expert import Artifact, Expert
from cusprun.errors import InvalidRequest

SPEED = {
    "decode_tps": ("tokens generated per second", "tokens/s"),
    "prefill_tps": ("tokens of the prompt read per second", "tokens/s"),
    "ttft_ms": ("time to the first token", "ms"),
    "peak_rss_bytes": ("peak memory", "bytes"),
    "file_bytes": ("file", "bytes"),
    "parameters": ("parameters", ""),
}


@dataclass(frozen=True)
class Figure:
    """One figure of the expert and of the dense model in the same type."""

    key: str  # of report.json
    name: str
    unit: str
    expert: float
    dense: float
    text: str | None = None  # the held-out text or the set of questions it was taken on


@dataclass(frozen=True)
class Figures:
    """The figures of one artifact, and how they were taken."""

    rows: tuple[Figure, ...]
    how: tuple[str, ...]


def read_figures(expert: Expert, artifact: Artifact) -> Figures | None:
    """The figures of an artifact; None where its type was not measured. Raises InvalidRequest of a damaged report."""
    path = expert.folder / "report" / artifact.quant / "report.json"
    try:
        report = expert.report
        if report is None or report["speed"]["expert"]["quant"] != artifact.quant:
            report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return None if report is None else _select(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{expert.folder}/report is damaged: {error!r}; build the expert again") from error


def _select(report: Mapping[str, Any]) -> Figures:
    speed, environment = report["speed"], report["environment"]
    rows = [
        Figure(key, name, unit, _mean(speed["expert"][key]), _mean(speed["dense"][key]))
        for key, (name, unit) in SPEED.items()
    ]
    for text, pair in sorted(report["quality"]["corpora"].items()):
        for key, name, unit in (("bits_per_byte", "bits per byte", "bits/byte"), ("perplexity", "perplexity", "")):
            rows.append(Figure(key, name, unit, float(pair["expert"][key]), float(pair["dense"][key]), text))
    for text, pair in sorted(report["tasks"]["sets"].items()):
        sides = [float(pair[who]["accuracy"]) for who in ("expert", "dense")]
        rows.append(Figure("accuracy", "accuracy", "share", sides[0], sides[1], text))
    machine = f"Measured on {environment['cpu']}, {environment['threads'] or environment['physical_cores']} threads."
    return Figures(tuple(rows), (machine, speed["how"], report["quality"]["how"]))


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)
