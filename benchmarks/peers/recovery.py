"""Pruning alone, LoRA alone on the dense model, and pruning with recovery after it, at equal time.

    python -m cusprun.benchmarks.peers.recovery

Pruning with refit takes as long as it takes; recovery by LoRA or by distillation then gets --minutes of training, and
LoRA alone on the dense model gets both times together. How many tokens fit is measured on this machine before. All arms
see the same calibration windows and are measured on the same held-out text. Writes <out>.json, .csv, .png and .md; an
arm that is there already is not run again, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.recovery_page import draw, page, write_csv
from cusprun.benchmarks.peers.study import EVAL_TOKENS
from cusprun.benchmarks.quality import evaluate_corpora
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.selection import read_texts, read_windows
from cusprun.dense import find_dense
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import write_json, written_whole
from cusprun.progress import say
from cusprun.recipe import DEFAULT_MODEL
from cusprun.recover import LEARNING_RATE, RANK, TOKENS, estimate, recover
from cusprun.recover.request import FEWEST, Kind
from cusprun.stages import Stages

# What is trained, and whether it was pruned before.
ARMS: dict[str, tuple[Kind | None, bool]] = {
    "dense": (None, False),
    "prune": (None, True),
    "LoRA": ("lora", False),
    "prune + LoRA": ("lora", True),
    "prune + distill": ("distill", True),
}
SHARED = ("text",)  # stages of the pruning that LoRA alone needs as well


def study(out: Path, work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Every arm; continues what ``out``.json holds of the same settings."""
    path = out.with_suffix(".json")
    found: dict[str, Any] = {"settings": settings, "environment": environment(), "cells": {}}
    if path.is_file() and (saved := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        found = saved
    cells = found["cells"]
    pruned = prune(work / "pruned", settings)
    stages = Stages(work / "pruned")
    seconds = sum(taken for name, taken in stages.seconds().items() if name not in SHARED)
    found.setdefault("pruning_seconds", round(seconds, 1))
    windows = read_windows(stages.folder / "windows.safetensors")
    texts, _ = read_texts(stages.folder / "texts.jsonl")
    dense = find_dense(settings["model"]).folder

    for name, (kind, is_pruned) in ARMS.items():
        if name in cells:
            say(f"{name}: measured before, kept")
            continue
        model, report = pruned if is_pruned else dense, None
        taken = found["pruning_seconds"] if is_pruned else 0.0
        if kind is not None:
            budget = 60 * settings["minutes"] + (0.0 if is_pruned else found["pruning_seconds"])
            shared: dict[str, Any] = {"kind": kind, "teacher": dense if kind == "distill" else None, "rank": RANK}
            tokens = found.setdefault("tokens", {})
            if name not in tokens:
                tokens[name] = tokens_in(budget, estimate(model, windows, **shared), settings["window"])
                write_json(path, found)
            folder = work / name.replace(" + ", "-").lower()
            done = recover(
                model, windows, folder, **shared, tokens=tokens[name], learning_rate=settings["learning_rate"],
                seed=settings["seed"], state=folder.with_suffix(".state"),
            )  # fmt: skip
            model, report = folder, done.as_json()
            taken += done.seconds
        read = evaluate_corpora(
            model, texts, context=settings["window"], max_tokens=settings["eval_tokens"], special=True
        )
        cells[name] = {
            "seconds": round(taken, 1),
            "parameters": cost(model).parameters,
            "recovery": report,
            "quality": {text: asdict(pair.artifact) for text, pair in read.items()},
            "nats": {text: pair.nats for text, pair in read.items()},  # of each window
        }
        write_json(path, found)
        say(f"{name}: done")
    return found


def tokens_in(seconds: float, for_default: float, window: int) -> int:
    """Tokens that fit into ``seconds`` where TOKENS take ``for_default``; FEWEST windows at the least."""
    return max(FEWEST * window, int(seconds / for_default * TOKENS))


def prune(out: Path, settings: dict[str, Any]) -> Path:
    """The pruned model's folder, by the command line as a user would; done stages are kept. Raises Failed."""
    words = ["prune", settings["model"], "--out", str(out), "--vocab", "keep"]
    for flag in ("lang", "domain", "task", "ratio", "tokens", "window", "seed"):
        if settings[flag] is not None:
            words += [f"--{flag}", str(settings[flag])]
    for file in settings["corpus"]:
        words += ["--corpus", file]
    if subprocess.run([sys.executable, "-m", "cusprun.cli", *words], stdout=subprocess.DEVNULL).returncode:
        raise Failed(f"cusprun-edge {' '.join(words)} failed; what it said stands above")
    return out / "model"


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/recovery"))
    parser.add_argument("--work", type=Path, default=cache_folder() / "studies" / "recovery", help="models and states")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training after the pruning")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--lang", default=None)
    parser.add_argument("--domain", default=None)
    parser.add_argument("--task", default=None)
    parser.add_argument("--corpus", action="append", default=[])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=EVAL_TOKENS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not (options.lang or options.domain or options.task or options.corpus):
        options.lang, options.domain, options.task = "en", "legal", "qa"
    return options


def main(arguments: list[str] | None = None) -> None:
    options, usual = vars(read_options(arguments)), vars(read_options([]))
    out, work = options.pop("out"), options.pop("work")
    try:
        found = study(out, work, options)
    except (InvalidRequest, Failed) as error:
        say(str(error))
        sys.exit(error.exit_code)
    write_csv(out.with_suffix(".csv"), found)
    draw(out.with_suffix(".png"), found)
    with written_whole(out.with_suffix(".md")) as part:
        part.write_text(page(found, out.name, usual), encoding="utf-8")


if __name__ == "__main__":
    main()
