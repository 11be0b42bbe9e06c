"""Folders as a build leaves them, reports alone: made of real report sections with figures of our choosing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cusprun.anatomy import LayerWidths
from cusprun.benchmarks.report import build_report, write_report
from cusprun.benchmarks.tally import Quality, QualityPair
from cusprun.benchmarks.tasks import score
from tests.benchmarks.test_speed import row
from tests.benchmarks.test_tasks import Item

RIGHT, WRONG = [0.0, -1.0], [-1.0, 0.0]
SAMPLES = [
    {"prompt": "Who pays the rent?\nA. The tenant.\nB. Nobody.", "reference": "A. The tenant.", "dense": "A.",
     "expert": "B."},
    {"prompt": "The court", "reference": None, "dense": "decides", "expert": ""},
]  # fmt: skip


def speeds(expert: list[float], dense: list[float], bytes_: tuple[int, int] = (107_000_000, 144_811_072)) -> list[Any]:
    return [row("expert.gguf", expert, bytes_[0]), row("dense.gguf", dense, bytes_[1])]


def qualities(expert: float, dense: float) -> dict[str, QualityPair]:
    """Two texts; bits per byte of the scenario as given."""
    one, other = Quality(24.1, 0.41, expert, 25_500, 0.12, 0.8, 512), Quality(20, 0.4, dense, 25_500, None, None, 512)
    worse = replace(one, bits_per_byte=1.5 * expert)
    return {"scenario": QualityPair(one, other), "general": QualityPair(worse, other)}


def answers(expert: int, dense: int, n: int = 64) -> dict[str, Any]:
    """``n`` questions whose right answer changes every time; so many are answered right by each."""
    items = [Item("p", ("a", "b"), number % 2) for number in range(n)]

    def likelihoods(right: int) -> list[list[float]]:
        return [RIGHT if (number < right) == (number % 2 == 0) else WRONG for number in range(n)]

    return {"questions": (score(items, likelihoods(expert)), score(items, likelihoods(dense)))}


def make_report(**changes: Any) -> dict[str, Any]:
    """A report of the tiny kind; ``changes`` are arguments of build_report."""
    held_out = {"text": "scenario", "side": "held-out", "entry": "law", "documents": 9, "licence": "MIT",
                "attribution": "Whoever wrote the law, in a sentence of some length", "source": "pypi:law@1.0",
                "sha256": "a" * 64}  # fmt: skip
    return build_report(
        **{
            "scenario": {"language": "en", "domain": "legal", "task": "qa", "name": "tiny"},
            "method": {"name": "refit", "ratio": 0.25, "vocabulary": {"dense": 49152, "expert": 28672}},
            "before": [LayerWidths(1536, 9, 3)] * 3,
            "after": [LayerWidths(1024, 9, 3), LayerWidths(0, 0, 0), LayerWidths(768, 6, 2)],
            "speed": speeds([150.0, 149.0, 151.0], [100.0, 101.0, 99.0]),
            "quality": qualities(0.92, 0.9),
            "tasks": answers(40, 42),
            "corpora": [held_out],
            "stages": {"statistics": 61.23},
            "proofs": [{"path": "gguf/tiny-q8_0.gguf", "quant": "q8_0", "top1_agreement": 0.99, "kld_mean": 0.002}],
            "samples": SAMPLES,
            **changes,
        }
    )


def make_expert(folder: Path, report: dict[str, Any] | None = None, **more: dict[str, Any]) -> Path:
    """An expert's folder; ``more`` are the reports of further types, by type."""
    report = report or make_report()
    write_report(folder / "report", report)
    types = {report["speed"]["expert"]["quant"]: report, **more}
    for quant, other in more.items():
        write_report(folder / "report" / quant, other)
    (folder / "recipe.yaml").write_text("model: tiny\nratio: 0.25\n", encoding="utf-8")
    card = {
        "base": {"id": "org/tiny", "parameters": 134_515_008, "licence": "apache-2.0"},
        "artifacts": [
            {"path": f"gguf/tiny-{quant}.gguf", "format": "gguf", "quant": quant, "bytes": 7, "sha256": "c" * 64}
            for quant in types
        ],
    }
    (folder / "expert.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def frontier(dominated: bool) -> dict[str, Any]:
    """As `compare` gives it: the expert of :func:`make_report`, and dense files smaller than it."""
    common = {"format": "gguf", "peak_rss_bytes": None, "remark": ""}
    bits = 0.91 if dominated else 0.95
    spread = {"mean": 160.0, "sd": 1.0, "n": 3}
    return {
        "rows": [
            {**common, "name": "tiny", "kind": "expert", "quant": "q8_0", "file_bytes": 107_000_000,
             "decode_tps": {**spread, "mean": 150.0}, "bits_per_byte": {"scenario": 0.92}, "dominated": dominated},
            {**common, "name": "dense q4", "kind": "dense", "quant": "q4_0", "file_bytes": 91_000_000,
             "decode_tps": spread, "bits_per_byte": {"scenario": bits}, "dominated": False},
            {**common, "name": "another", "kind": "given", "quant": "q2_k", "file_bytes": 60_000_000,
             "decode_tps": {**spread, "mean": 170.0}, "bits_per_byte": {"scenario": 1.4}, "dominated": False},
        ],
        "text": "scenario",
        "verdicts": ["tiny stands beside two others."],
    }  # fmt: skip
