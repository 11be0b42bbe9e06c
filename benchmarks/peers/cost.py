"""What importance costs beside one plain forward pass, and how it ranks units beside the leave-one-out oracle.

    python -m cusprun.benchmarks.peers.cost

Forward pass, importance of Cus-Prun and refit's statistics run in turn over the same tokens on one thread; CPU seconds
count, so that what else runs on the machine hardly shows. Then the oracle takes sampled units out of a few layers, one
by one. Writes <out>.json, .csv, .png and .md; a cell that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.cost_page import MEASURES, draw, oracle_cell, page, write_csv
from cusprun.checkpoint import Weights, load_model, load_tokenizer
from cusprun.corpora.catalog import make_scenario
from cusprun.corpora.selection import Selection, read_windows
from cusprun.dense import Dense, find_dense
from cusprun.files import write_json, written_whole
from cusprun.importance import LayerImportance, LayerMatrices, find_criterion
from cusprun.progress import say
from cusprun.recipe import DEFAULT_MODEL

BATCH = 2048  # tokens that go through a layer at once, in every pass
WINDOW = 512


def forward(model: Any, windows: np.ndarray) -> None:
    """One plain pass of the model, in memory already, up to the last hidden state: no output head, nothing watched."""
    import torch

    with torch.no_grad():
        for start in range(0, len(windows), BATCH // WINDOW):
            model.model(torch.from_numpy(windows[start : start + BATCH // WINDOW]), use_cache=False)


def importance(dense: Dense, windows: np.ndarray) -> list[LayerImportance]:
    """Cus-Prun's scores of every layer: reading the weights from disk, statistics, closed form."""
    from cusprun.statistics import stream

    anatomy, weights, criterion = dense.anatomy, Weights(dense.folder), find_criterion("cus-prun")
    scores = []
    for index, seen in enumerate(stream(dense.folder, anatomy, {"text": windows}, batch_tokens=BATCH)):
        prefix = anatomy.prefix(index)
        down, output = weights[prefix + "mlp.down_proj.weight"], weights[prefix + "self_attn.o_proj.weight"]
        scores.append(criterion.score(seen["text"], LayerMatrices(down, output)))
    return scores


def refit_statistics(dense: Dense, windows: np.ndarray) -> None:
    """The second moments that refit takes of every layer's two matrices, over two halves of the windows, its short
    windows included.
    """
    from cusprun.gram import Gram
    from cusprun.sinks import scales, starts
    from cusprun.statistics import walk

    anatomy = dense.anatomy
    texts = {"text": windows, "starts": starts(windows)}
    for index, batches in walk(dense.folder, anatomy, texts, label="moments", batch_tokens=BATCH):
        widths = anatomy.layers[index]
        channels, heads = Gram.empty(widths.ffn), Gram.empty(widths.heads * anatomy.head_dim)
        for batch in batches:
            scale = scales(batch.norm)
            channels.add_batch(batch.channels * scale, batch)
            heads.add_batch(batch.heads * scale, batch)


def timed(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def oracle(dense: Dense, model: Any, windows: np.ndarray, layer: int, count: int, scores: LayerImportance) -> Any:
    """One layer's sampled units: closed form, the oracle's three changes, and what the oracle took."""
    from cusprun.importance.oracle import ablate, sample_units

    widths = dense.anatomy.layers[layer]
    units = sample_units(widths.ffn, widths.kv_heads, count)
    found: list[Any] = []
    seconds = {
        "output": timed(lambda: ablate(model, windows, layer, units, loss=False))["cpu_s"],
        "loss": timed(lambda: found.extend(ablate(model, windows, layer, units)))["cpu_s"],
    }
    return {
        "seconds": seconds,
        "units": [
            {
                "kind": ablation.unit.kind,
                "index": ablation.unit.index,
                "closed_form": float(
                    (scores.ffn if ablation.unit.kind == "ffn" else scores.attention)[ablation.unit.index]
                ),
                **{measure: getattr(ablation, measure) for measure in MEASURES},
            }
            for ablation in found
        ],
    }


def measure(
    out: Path, tokens: int, rounds: int, layers: Sequence[int], oracle_tokens: int, units: int, threads: int
) -> dict[str, Any]:
    """Every cell; continues what ``out``.json holds of the same model, text and threads."""
    import torch

    torch.set_num_threads(threads)
    path = out.with_suffix(".json")
    same = {"model": DEFAULT_MODEL, "scenario": "en-legal-qa", "tokens": tokens, "window": WINDOW, "threads": threads}
    settings = {**same, "rounds": rounds, "layers": list(layers), "oracle_tokens": oracle_tokens, "units": units}
    found: dict[str, Any] = {"environment": environment(), "cells": {}}
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if same.items() <= saved["settings"].items():
            found = saved
    found["settings"] = settings
    cells = found["cells"]

    def keep(name: str, work: Callable[[], Any]) -> None:
        if name not in cells:
            cells[name] = work()
            write_json(path, found)
        say(f"{name}: done")

    dense = find_dense(DEFAULT_MODEL)
    model = load_model(dense.folder)
    windows = _windows(dense, max(tokens, oracle_tokens))
    timing, probes = windows[: tokens // WINDOW], windows[: oracle_tokens // WINDOW]
    passes: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model, timing),
        "importance": lambda: importance(dense, timing),
        "refit statistics": lambda: refit_statistics(dense, timing),
    }
    forward(model, timing[:1])  # the first pass warms the library up
    for number in range(rounds):
        for name, work in passes.items():
            keep(f"{name}, round {number}", lambda work=work: timed(work))  # type: ignore[misc]
    names = {layer: oracle_cell(settings, layer) for layer in layers}
    if not all(name in cells for name in names.values()):
        scores = importance(dense, probes)
        for layer, name in names.items():
            keep(name, lambda layer=layer: oracle(dense, model, probes, layer, units, scores[layer]))  # type: ignore[misc]
    found["result"] = summarize(found, sum(widths.ffn + widths.kv_heads for widths in dense.anatomy.layers))
    write_json(path, found)
    return found


def _windows(dense: Dense, tokens: int) -> np.ndarray:
    """Calibration windows of all the scenario's dimensions in turn, (n, WINDOW)."""
    with tempfile.TemporaryDirectory(prefix="cusprun-study-") as scratch:
        selection = Selection(
            make_scenario("en", "legal", "qa"), (), {}, (), max(2 * tokens, 16 * WINDOW), WINDOW, 1, 0
        )
        selection.write(load_tokenizer(dense.folder), Path(scratch) / "w", Path(scratch) / "t")
        dimensions = list(read_windows(Path(scratch) / "w").values())
    most = max(map(len, dimensions))
    turns = [ids[place] for place in range(most) for ids in dimensions if place < len(ids)]
    return np.stack(turns)[: -(-tokens // WINDOW)]


def summarize(found: dict[str, Any], all_units: int) -> dict[str, Any]:
    """Ratios to the plain pass, the oracle's cost for every unit of the model, and rank correlations by layer.

    The oracle's seconds are those of the sampled units, scaled to ``all_units`` and to the tokens of the timed passes.
    """
    from scipy.stats import spearmanr

    cells, settings = found["cells"], found["settings"]

    def seconds(name: str) -> list[float]:
        return [cells[f"{name}, round {number}"]["cpu_s"] for number in range(settings["rounds"])]

    plain = seconds("forward")
    ratios = {
        name: [cost / base for cost, base in zip(seconds(name), plain, strict=True)]
        for name in ("importance", "refit statistics")
    }
    oracles = [cells[oracle_cell(settings, layer)] for layer in settings["layers"]]
    factors = {
        kind: mean(cell["seconds"][kind] / len(cell["units"]) for cell in oracles)
        * all_units * settings["tokens"] / settings["oracle_tokens"] / median(seconds("importance"))
        for kind in ("output", "loss")
    }  # fmt: skip
    ranks = {}
    for layer, cell in zip(settings["layers"], oracles, strict=True):
        channels = [unit for unit in cell["units"] if unit["kind"] == "ffn"]
        ranks[str(layer)] = {
            f"{name}, {measure}": float(
                spearmanr([unit["closed_form"] for unit in of], [unit[measure] for unit in of]).statistic
            )
            for name, of in (("all units", cell["units"]), ("channels", channels))
            for measure in MEASURES
        }
    return {
        "forward_cpu_s": median(plain),
        "ratios": {name: {"median": median(values), "rounds": values} for name, values in ratios.items()},
        "oracle_factor": factors,
        "units_of_the_model": all_units,
        "spearman": ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/cost"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 14, 27])
    parser.add_argument("--oracle-tokens", type=int, default=2048)
    parser.add_argument("--units", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    found = measure(
        options.out, options.tokens, options.rounds, options.layers, options.oracle_tokens, options.units,
        options.threads,
    )  # fmt: skip
    write_csv(options.out.with_suffix(".csv"), found)
    draw(options.out.with_suffix(".png"), found)
    with written_whole(options.out.with_suffix(".md")) as part:
        part.write_text(page(found, options.out.name), encoding="utf-8")


if __name__ == "__main__":
    main()
