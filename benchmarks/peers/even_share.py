"""How far may layers differ, and how should dimensions combine? Measured on the calibration side only.

    python -m cusprun.benchmarks.peers.even_share --out docs/results/even-share

Half of a scenario's calibration windows give the statistics, the other half the perplexity; held-out text is not looked
at. Writes <out>.json and <out>.md; a cell that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.allocation import plan_ratio
from cusprun.checkpoint import Weights, load_model, load_tokenizer
from cusprun.compact import compact
from cusprun.corpora.catalog import make_scenario
from cusprun.corpora.selection import Selection, read_windows
from cusprun.dense import find_dense
from cusprun.files import write_json, written_whole
from cusprun.methods import score_layers
from cusprun.progress import say
from cusprun.recipe import DEFAULT_MODEL
from cusprun.statistics import collect

SHARES = (0.0, 0.4, 0.6, 0.7, 0.8, 0.9)
COMBINES = ("intersection", "mixture", "max")


def perplexity(folder: Path, windows: np.ndarray) -> float:
    """exp of the mean loss over all but the first half of each window, (n, window)."""
    import torch

    model = load_model(folder)
    total = count = 0.0
    half = windows.shape[1] // 2
    with torch.no_grad():
        for window in torch.from_numpy(windows):
            logits = model(window.unsqueeze(0), logits_to_keep=half + 1).logits[0, :-1]
            targets = window[half:]
            total += float(torch.nn.functional.cross_entropy(logits[-len(targets) :], targets, reduction="sum"))
            count += len(targets)
    return math.exp(total / count)


def study(out: Path, tokens: int, ratio: float, windows_scored: int) -> dict[str, Any]:
    """Perplexities by combine and share; continues what ``out``.json holds."""
    path = out.with_suffix(".json")
    settings = {"scenario": "en-legal-qa", "tokens": tokens, "ratio": ratio, "windows_scored": windows_scored}
    found: dict[str, Any] = {"settings": settings, "cells": {}}
    if path.is_file() and (saved := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        found = saved
    dense = find_dense(DEFAULT_MODEL)
    with tempfile.TemporaryDirectory(prefix="cusprun-study-") as scratch:
        selection = Selection(make_scenario("en", "legal", "qa"), (), {}, (), tokens, 512, 1, 0)
        selection.write(load_tokenizer(dense.folder), Path(scratch) / "w", Path(scratch) / "t")
        windows = read_windows(Path(scratch) / "w")
        scored = np.concatenate([ids[1::2] for ids in windows.values()])
        scored = scored[:: max(1, len(scored) // windows_scored)][:windows_scored]
        statistics = collect(dense.folder, dense.anatomy, {name: ids[::2] for name, ids in windows.items()})

        def measure(name: str, folder: Path) -> None:
            if name not in found["cells"]:
                found["cells"][name] = perplexity(folder, scored)
                write_json(path, found)
            say(f"{name}: {found['cells'][name]:.2f}")

        measure("dense", dense.folder)
        cells = [("intersection", "per-layer", share) for share in SHARES]
        cells += [(combine, "per-layer", 0.8) for combine in COMBINES[1:]]
        cells += [(combine, "uniform", 1.0) for combine in COMBINES]
        for combine, layout, share in cells:
            name = f"{combine}, {layout}" + (f", share {share:g}" if layout == "per-layer" else "")
            expert = Path(scratch) / "expert"
            if name not in found["cells"]:
                scores = score_layers(Weights(dense.folder), dense.anatomy, statistics, "cus-prun", combine)  # type: ignore[arg-type]
                plan = plan_ratio(dense.anatomy, scores, ratio, align=32, layout=layout, even_share=share)  # type: ignore[arg-type]
                compact(dense.folder, plan, expert)
            measure(name, expert)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=49152)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--windows-scored", type=int, default=16)
    options = parser.parse_args()
    found = study(options.out, options.tokens, options.ratio, options.windows_scored)
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in found["cells"].items())
    with written_whole(options.out.with_suffix(".md")) as part:
        part.write_text(
            "# How far layers may differ\n\n"
            "`python -m cusprun.benchmarks.peers.even_share --out docs/results/even-share`\n\n"
            f"SmolLM2-135M-Instruct, en-legal-qa, {options.tokens} calibration tokens, {options.ratio:.0%} of all "
            f"parameters removed; perplexity on {options.windows_scored} windows of calibration-side text that gave no "
            "statistics.\n\n"
            f"| cut | perplexity |\n| --- | --- |\n{rows}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
