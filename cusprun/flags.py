"""Flags that several commands share: those of `build` and `prune`, each a field of the recipe, and `--json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str | None, typer.Option(help="Dense model: a folder, a .gguf, a hub id, or the default.")]
Revision = Annotated[str | None, typer.Option(help="Commit or tag of a hub model.")]
Lang = Annotated[str | None, typer.Option(help="Language of the scenario: en de fr es it pt.")]
Domain = Annotated[str | None, typer.Option(help="Domain: legal medical science software general.")]
Task = Annotated[str | None, typer.Option(help="Task: qa summarization classification translation.")]
Corpus = Annotated[list[str] | None, typer.Option(help="Your own text, FILE[:weight]; may be repeated.")]
Dim = Annotated[list[str] | None, typer.Option(help="A further dimension, NAME=FILE; may be repeated.")]
Include = Annotated[list[str] | None, typer.Option(help="A catalog entry not used by itself.")]
Method = Annotated[str | None, typer.Option(help="refit (least-squares repair), or cus-prun (slices alone).")]
Combine = Annotated[str | None, typer.Option(help="intersection, mixture or max of the dimensions.")]
Ratio = Annotated[float | None, typer.Option(help="Share of all parameters that goes; default 0.25.")]
Epsilon = Annotated[float | None, typer.Option(help="Remove what changes a layer by no more than this.")]
Layout = Annotated[str | None, typer.Option(help="per-layer widths, or uniform.")]
Align = Annotated[int | None, typer.Option(help="FFN widths are multiples of this.")]
Tokens = Annotated[int | None, typer.Option(help="Calibration tokens, shared by the dimensions.")]
Window = Annotated[int | None, typer.Option(help="Tokens of one calibration window.")]
Quant = Annotated[list[str] | None, typer.Option(help="GGUF type: f32 f16 q8_0 q4_0 q4_1 q4_k_m; repeat.")]
Measure = Annotated[bool | None, typer.Option("--measure/--no-measure", help="Measure dense and expert.")]
EvalTokens = Annotated[int | None, typer.Option(help="Tokens of each evaluation text.")]
Questions = Annotated[int | None, typer.Option(help="Most multiple-choice questions to ask.")]
Repetitions = Annotated[int | None, typer.Option(help="Speed runs of each artifact.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling of text.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads of measurements; default: physical cores.")]
Name = Annotated[str | None, typer.Option(help="Name of the expert.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the expert; default experts/<name>.")]
Recipe = Annotated[Path | None, typer.Option(help="A recipe.yaml to replay; other flags override it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
