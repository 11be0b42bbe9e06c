"""What do fewer tokens cost? Trimmed by frequency and by expected loss, at several sizes, in bits per byte.

    python -m cusprun.benchmarks.peers.vocabulary --out docs/results/vocabulary

Prices are those of a build by its defaults, from calibration-side text alone. Every vocabulary then reads the same
bytes of held-out text: windows of 512 tokens as the dense tokenizer cuts them, at even distances, of which the second
half is scored. Writes <out>.json, .csv, .md and .png; a cell that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks.peers.expert_study import given_words
from cusprun.benchmarks.peers.vocabulary_page import write_pages
from cusprun.checkpoint import load_model, load_tokenizer
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.catalog import make_scenario
from cusprun.corpora.document import Scenario
from cusprun.corpora.packing import render
from cusprun.corpora.sampling import evaluation_texts
from cusprun.corpora.selection import Selection
from cusprun.dense import Dense, find_dense
from cusprun.files import write_json
from cusprun.progress import say, track
from cusprun.recipe import DEFAULT_MODEL, WINDOW, make_recipe
from cusprun.rows import price_weights
from cusprun.stages import VERSIONS
from cusprun.vocabulary import (
    VocabularyPrices,
    count_tokens,
    expected_rates,
    load_prices,
    order_removals,
    price_vocabulary,
    read_pieces,
    trim_model,
)

REMOVED = (8192, 16384, 24576)  # rows


@dataclass(frozen=True)
class Window:
    """Text to read and the text behind it whose bytes are scored."""

    before: str
    scored: str


def build_selection(scenario: Scenario) -> Selection:
    """The calibration text of a build by its defaults."""
    recipe = make_recipe({"lang": scenario.language, "domain": scenario.domain, "task": scenario.task})
    return Selection.of(recipe, scenario, (), {})


def cut_windows(documents: Sequence[str], tokenizer: Any, count: int) -> list[Window]:
    """``count`` windows of WINDOW dense tokens at even distances over the joined documents, cut before blanks."""
    text = "\n\n".join(documents)
    starts = [start for start, _ in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets]
    whole = len(starts) // WINDOW

    def blank(number: int) -> int:
        while number < len(starts) and not text[starts[number]].isspace():
            number += 1
        return starts[number] if number < len(starts) else len(text)

    windows = []
    for index in range(min(count, whole)):
        first = (index * whole // min(count, whole)) * WINDOW
        begin, middle, end = (blank(first + part) for part in (0, WINDOW // 2, WINDOW))
        windows.append(Window(text[begin:middle], text[middle:end]))
    return windows


def score(folder: Path, windows: dict[str, list[Window]]) -> dict[str, list[float]]:
    """Nats of the scored text of each window, by text."""
    import torch

    tokenizer, model = load_tokenizer(folder), load_model(folder)
    found: dict[str, list[float]] = {}
    for name, cut in windows.items():
        found[name] = []
        for window in track(cut, f"{name}: {folder.name}", total=len(cut)):
            before, scored = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (window.before, window.scored)
            )
            with torch.inference_mode():
                ids = torch.tensor([[*before, *scored]])
                logits = model(ids[:, :-1], use_cache=False, logits_to_keep=len(scored)).logits[0].double()
                nats = torch.nn.functional.cross_entropy(logits, torch.tensor(scored), reduction="sum")
            found[name].append(float(nats))
    return found


def compare(nats: Sequence[float], dense: Sequence[float], n_bytes: int) -> dict[str, float]:
    """Bits per byte, its increase over dense, and the increase's standard error over the windows, which both saw."""
    one, other = np.array(nats), np.array(dense)
    increase = float(one.sum() / other.sum() - 1)
    rest = one - other * (1 + increase)
    error = float(np.sqrt((rest**2).sum() * len(one) / max(len(one) - 1, 1)) / other.sum())
    return {"bits_per_byte": float(one.sum()) / math.log(2) / n_bytes, "increase": increase, "stderr": error}


def removal_orders(
    dense: Dense, selection: Selection, work: Path
) -> tuple[dict[str, np.ndarray], VocabularyPrices, dict[str, float]]:
    """For each method the ids in the order in which they go; a build's prices, kept in ``work``, and their weights."""
    tokenizer, pieces = load_tokenizer(dense.folder), read_pieces(dense.folder)
    text = selection.rendered(tokenizer)
    weights = price_weights(selection.shares(list(text.by_dimension)))
    path = work / f"prices-{VERSIONS['prices']}-{dense.key[:16]}.safetensors"
    if not path.is_file():
        price_vocabulary(dense.folder, text.by_dimension, weights, own=text.own, originals=text.originals).save(path)
    prices = load_prices(path)
    windows = np.concatenate(list(selection.windows(tokenizer).values()))
    sampled = np.bincount(windows.ravel(), minlength=pieces.rows).astype(np.float64)
    usages = {name: count_tokens(texts, tokenizer, pieces.rows) for name, texts in text.by_dimension.items()}
    orders = {
        "frequency": order_removals(pieces, sampled),
        "frequency, all text": order_removals(pieces, expected_rates(usages, weights)),
        "expected loss": prices.order,
    }
    return orders, prices, weights


def study(
    out: Path, tokens: int, removals: Sequence[int], scenario: Scenario, model: str = DEFAULT_MODEL
) -> dict[str, Any]:
    """All cells; continues what ``out``.json holds."""
    dense = find_dense(model)
    path = out.with_suffix(".json")
    selection = build_selection(scenario)
    key = selection.key()
    settings = {
        "scenario": str(scenario), "model": dense.id, "tokens": tokens, "text": key,
        "parameters": dense.anatomy.parameters,
    }  # fmt: skip
    found: dict[str, Any] = {"settings": settings, "dense": {}, "cells": []}
    if path.is_file() and (saved := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        found = saved
    tokenizer = load_tokenizer(dense.folder)
    orders, prices, weights = removal_orders(dense, selection, cache_folder() / "studies" / "vocabulary" / key[:16])
    held_out = {
        name: cut_windows([render(document, tokenizer) for document in documents], tokenizer, tokens // WINDOW)
        for name, documents in evaluation_texts(scenario).items()
    }
    n_bytes = {name: sum(len(window.scored.encode()) for window in cut) for name, cut in held_out.items()}
    found |= {"prices": prices.note, "weights": {name: round(weight, 4) for name, weight in weights.items()}}
    if not found["dense"]:
        found["dense"] = {"nats": score(dense.folder, held_out), "bytes": n_bytes}
        write_json(path, found)
    found["cells"] = [row for row in found["cells"] if row.get("prices", VERSIONS["prices"]) == VERSIONS["prices"]]
    done = {(row["method"], row["removed"]) for row in found["cells"]}
    for removed in removals:
        for method, order in orders.items():
            if (method, removed) in done:
                continue
            kept = np.setdiff1d(np.arange(prices.rows), order[:removed]).tolist()
            with tempfile.TemporaryDirectory() as scratch:
                trim_model(dense.folder, kept, Path(scratch) / "trimmed")
                nats = score(Path(scratch) / "trimmed", held_out)
            row: dict[str, Any] = {
                "method": method,
                "removed": removed,
                "share": removed * dense.anatomy.hidden_size / dense.anatomy.parameters,
                "texts": {name: compare(nats[name], found["dense"]["nats"][name], n_bytes[name]) for name in nats},
            }
            if method == "expected loss":
                row["prices"] = VERSIONS["prices"]
                row["expected"] = float(prices.curve[removed]) / prices.dense_nats
                row["expected_new_text"] = float(prices.new_text[removed]) / prices.dense_nats
            found["cells"].append(row)
            write_json(path, found)
            say(f"{method}, {removed} rows: " + ", ".join(f"{n} {v['increase']:+.2%}" for n, v in row["texts"].items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/vocabulary"))
    parser.add_argument("--tokens", type=int, default=8192, help="dense tokens of each held-out text")
    parser.add_argument("--removed", type=int, nargs="+", default=REMOVED, help="rows that go")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the dense model")
    parser.add_argument("--lang", default="en")
    parser.add_argument("--domain", default="legal")
    parser.add_argument("--task", default="qa")
    options = parser.parse_args()
    scenario = make_scenario(options.lang, options.domain, options.task)
    found = study(options.out, options.tokens, options.removed, scenario, options.model)
    found["command"] = " ".join(["python -m cusprun.benchmarks.peers.vocabulary", *given_words()])
    write_json(options.out.with_suffix(".json"), found)
    write_pages(options.out, found)


if __name__ == "__main__":
    main()
