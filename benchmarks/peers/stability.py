"""How stable a selection is, and how far it has fitted its calibration text.

    python -m cusprun.benchmarks.peers.stability

Which units stay when the calibration windows are drawn again, or one of them is another; and what pruning costs on the
calibration text itself, on documents set aside from it and on held-out texts, also as the instability
(t_pre - t_post) / t_pre of Bartoldson et al. 2020 with t the next-token accuracy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks import quality
from cusprun.benchmarks.peers.grid import CONTEXT, Cell, Grid
from cusprun.benchmarks.peers.held_out import Gauge
from cusprun.benchmarks.peers.scenes import EN_LEGAL_QA, Scene, selection_key
from cusprun.benchmarks.peers.selections import (
    REFIT,
    SCORED,
    bootstrap,
    by_chance,
    choose_refit,
    choose_scored,
    compare,
    replacements,
)
from cusprun.benchmarks.peers.study import Study, main_of
from cusprun.benchmarks.peers.study_page import Row
from cusprun.benchmarks.peers.study_picture import bars
from cusprun.benchmarks.tally import percent
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.selection import read_aside, read_windows
from cusprun.errors import InvalidRequest
from cusprun.files import write_json
from cusprun.progress import say
from cusprun.stages import VERSIONS

METHODS = ("refit", "cus-prun", "flap", "wanda-sp", "magnitude", "random")
RATIO = 0.25
CALIBRATION, ASIDE = "calibration", "set aside"
SEED = 1


def cells(scenes: Sequence[Scene], tokens: int) -> list[Cell]:
    return [
        Cell(
            f"{scene.name}/{method}",
            scene,
            {"method": method, "ratio": RATIO, "vocab": "keep"},
            {"method": method},
        )
        for scene in scenes
        for method in METHODS
    ]


# what pruning costs on text near and far ------------------------------------------------------------------------------


def near_and_far(gauge: Gauge, model: Path, windows: Path, texts: Mapping[str, list[str]]) -> dict[str, Any]:
    """Bits per byte and next-token accuracy on calibration windows, those set aside and the held-out texts."""
    calibration = np.concatenate(list(read_windows(windows).values()))
    most = max(1, gauge.eval_tokens // calibration.shape[1])
    found = {CALIBRATION: gauge.windows(model, calibration[:: -(-len(calibration) // most)])}
    if aside := read_aside(windows):
        found[ASIDE] = gauge.windows(model, np.concatenate(list(aside.values())))
    tokenizer = load_tokenizer(gauge.dense.folder)
    for name, documents in texts.items():
        ids = tokenizer.encode(quality.join(documents), add_special_tokens=False)
        cut = quality.windows(ids, CONTEXT, "second-half", gauge.eval_tokens // CONTEXT)
        found[name] = gauge.windows(model, np.array(cut))
    return found


def instability(figures: Mapping[str, float]) -> float | None:
    """(t_pre - t_post) / t_pre with t the next-token accuracy; None where the dense model gets no token right."""
    return 1 - figures["accuracy"] / figures["dense_accuracy"] if figures["dense_accuracy"] else None


def increase(figures: Mapping[str, float]) -> float:
    return figures["bits_per_byte"] / figures["dense"] - 1


def sentences(rows: Sequence[Row]) -> list[str]:
    said = []
    for row in rows:
        figures = row.result["stability"]
        on, far = increase(figures[CALIBRATION]), increase(figures["scenario"]) if "scenario" in figures else None
        line = f"{row.scene}, {row['method']}: {percent(on)} on the calibration text itself"
        if ASIDE in figures:
            near = increase(figures[ASIDE])
            line += f", {percent(near)} on documents set aside (a gap of {100 * (near - on):+.1f} points)"
        said.append(f"{line}, {percent(far)} on the scenario's held-out text.")
    return said


# selections -----------------------------------------------------------------------------------------------------------


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resamples", type=int, default=20, help="bootstrap draws of the windows")
    parser.add_argument("--replaced", type=int, default=10, help="draws in which one window is another")
    parser.add_argument("--select-tokens", type=int, default=16384, help="calibration tokens of a draw")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 14, 27], help="layers that are compared")


def select(grid: Grid, chosen: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Stability of every method's selection for every scene whose cells have results; what was done before is kept."""
    found: dict[str, dict[str, Any]] = {}
    layers = sorted(set(chosen.layers))
    if max(layers) >= len(grid.dense.anatomy.layers):
        raise InvalidRequest(f"--layers {max(layers)}: the model has layers 0 to {len(grid.dense.anatomy.layers) - 1}")
    for scene in {cell.scene.name: cell.scene for cell in grid.cells.values()}.values():
        if not any(cell.scene == scene and grid.result(cell) for cell in grid.cells.values()):
            continue
        found[scene.name] = {}
        for method in (*SCORED, REFIT):
            wish = [
                grid.dense.key, selection_key(scene, chosen.window), method, layers, chosen.resamples, chosen.replaced,
                chosen.select_tokens, chosen.window, RATIO, VERSIONS["text"], VERSIONS["statistics"], VERSIONS["refit"],
            ]  # fmt: skip
            key = hashlib.sha256(json.dumps(wish, sort_keys=True).encode()).hexdigest()
            path = grid.setup.work / "cells" / f"{key[:32]}.json"
            if not path.is_file():
                say(f"selections of {method} for {scene.name}")
                write_json(path, _select(grid, scene, method, layers, chosen))
            found[scene.name][method] = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = {cell.scene.name: {} for cell in grid.cells.values()}
    for cell in grid.cells.values():
        if (result := grid.result(cell)) is not None:
            rows[cell.scene.name][cell.labels["method"]] = result["stability"]
    return {"selections": found}, [*_selection_lines(found, chosen), *_instability_lines(rows)]


def _select(grid: Grid, scene: Scene, method: str, layers: Sequence[int], chosen: argparse.Namespace) -> dict[str, Any]:
    windows = _windows(grid, scene, chosen)
    sizes = {name: len(ids) for name, ids in windows.items()}
    base = {name: np.arange(size) for name, size in sizes.items()}
    draws = {
        "bootstrap": [base, *bootstrap(sizes, chosen.resamples, SEED)],
        "one window replaced": replacements(sizes, chosen.replaced, SEED),
    }
    flat = [draw for drawn in draws.values() for draw in drawn]
    if method == REFIT:
        kept = choose_refit(grid.dense, windows, flat, layers, RATIO)
    else:
        kept = choose_scored(grid.dense, windows, flat, layers, RATIO, method)
    first = len(draws["bootstrap"])
    parts = {"bootstrap": slice(0, first), "one window replaced": slice(first, None)}
    return {
        "windows": sizes,
        **{name: compare({index: found[part] for index, found in kept.items()}, grid.dense)
           for name, part in parts.items()},
    }  # fmt: skip


def _windows(grid: Grid, scene: Scene, chosen: argparse.Namespace) -> dict[str, np.ndarray]:
    """Calibration windows of the scene by dimension."""
    wish = replace(scene.selection(chosen.window), tokens=chosen.select_tokens)
    with tempfile.TemporaryDirectory(prefix="cusprun-study-") as scratch:
        path = Path(scratch) / "windows"
        wish.write(load_tokenizer(grid.dense.folder), path, Path(scratch) / "texts")
        return read_windows(path)


def _selection_lines(found: Mapping[str, Mapping[str, Any]], chosen: argparse.Namespace) -> list[str]:
    lines = ["## Selections", ""]
    lines += [
        f"A quarter of the channels of each of the layers {', '.join(map(str, sorted(set(chosen.layers))))} goes, on "
        f"{chosen.select_tokens:,} tokens; Jaccard index with the selection on all windows, mean and least over layers "
        f"and {chosen.resamples} bootstrap draws of the windows, or {chosen.replaced} draws with one window replaced. "
        f"By chance two selections would share {by_chance(1 - RATIO):.2f} of the channels kept and "
        f"{by_chance(RATIO):.2f} of those removed.",
        "",
        "| scenario | method | draw | channels kept | channels removed | kv groups kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for scene, methods in found.items():
        for method, figures in methods.items():
            for draw in ("bootstrap", "one window replaced"):
                cells = [
                    f"{figures[draw][name]:.3f} ({figures[draw][f'{name}, least']:.3f})"
                    for name in ("kept", "removed", "kv groups")
                ]
                lines.append(f"| {scene} | {method} | {draw} | {' | '.join(cells)} |")
    return lines


def _instability_lines(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A table of (t_pre - t_post) / t_pre by method and text."""
    lines = []
    for scene, methods in rows.items():
        if not methods:
            continue
        texts = list(dict.fromkeys(text for figures in methods.values() for text in figures))
        lines += ["", f"## Instability, {scene}", "", "(t_pre - t_post) / t_pre, t the next-token accuracy.", ""]
        lines += [f"| method | {' | '.join(texts)} |", "| --- |" + " --- |" * len(texts)]
        dense = next(iter(methods.values()))
        lines.append(
            "| dense accuracy | " + " | ".join(f"{dense[text]['dense_accuracy']:.1%}" for text in texts) + " |"
        )
        for method, figures in methods.items():
            found = [instability(figures[text]) if text in figures else None for text in texts]
            shares = ["" if share is None else f"{share:.3f}" for share in found]
            lines.append(f"| {method} | {' | '.join(shares)} |")
    return lines


STUDY = Study(
    name="stability",
    title="How stable a selection is",
    about="A quarter of all parameters removed, vocabulary kept; the cost on the calibration text itself, on documents "
    "set aside from it and on held-out texts; and the units kept when the calibration windows are drawn again.",
    cells=cells,
    groups=(),
    columns=("method",),
    sentences=sentences,
    picture=bars(("method",)),
    scenes=(EN_LEGAL_QA,),
    also=near_and_far,
    more=select,
    options=options,
)

if __name__ == "__main__":
    main_of(STUDY)
