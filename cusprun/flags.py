"""Flags that several commands share: those of `build` and `prune`, each a field of the recipe, and `--json`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cusprun import onnx_types
from cusprun.quants import NAMES

Model = Annotated[str | None, typer.Option(help="Dense model: a folder, a .gguf, a hub id, or the default.")]
Revision = Annotated[str | None, typer.Option(help="Commit or tag of a hub model.")]
Lang = Annotated[str | None, typer.Option(help="Language of the scenario: en de fr es it pt.")]
Domain = Annotated[str | None, typer.Option(help="Domain: legal medical science software general.")]
Task = Annotated[str | None, typer.Option(help="Task: qa summarization classification translation.")]
Corpus = Annotated[list[str] | None, typer.Option(help="Your own text, FILE[:weight]; may be repeated.")]
Dim = Annotated[list[str] | None, typer.Option(help="A further dimension, NAME=FILE; may be repeated.")]
Include = Annotated[list[str] | None, typer.Option(help="A catalog entry not used by itself.")]
General = Annotated[float | None, typer.Option(help="Share of the calibration text that is general; default 0.125.")]
Weight = Annotated[list[str] | None, typer.Option(help="A dimension's weight, NAME=NUMBER; may be repeated.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="refit (default); cus-prun llm-pruner llm-pruner-vector llm-pruner-element2 llm-pruner-mix flap "
        "wanda-sp slicegpt shortgpt magnitude random."
    ),
]
Combine = Annotated[str | None, typer.Option(help="intersection, mixture or max of the dimensions.")]
Widths = Annotated[str | None, typer.Option(help="Where refit cuts: measured, scores or even.")]
Form = Annotated[str | None, typer.Option(help="Refit sequential (default) or parallel.")]
Vocab = Annotated[str | None, typer.Option(help="Tokens that stay: keep, auto (default) or a number.")]
Recover = Annotated[str | None, typer.Option(help="Train after the cut: lora or distill; default: not at all.")]
RecoverRank = Annotated[int | None, typer.Option(help="Rank of the adapters.")]
RecoverTokens = Annotated[int | None, typer.Option(help="Tokens that recovery reads in all.")]
RecoverRate = Annotated[float | None, typer.Option(help="Learning rate of recovery.")]
Ratio = Annotated[float | None, typer.Option(help="Share of all parameters that goes; default 0.25.")]
Epsilon = Annotated[float | None, typer.Option(help="Remove what changes a layer by no more than this.")]
Size = Annotated[str | None, typer.Option(help="Instead of a ratio: the file's size at most, such as 60MB.")]
Ram = Annotated[str | None, typer.Option(help="Peak memory at most of the process that runs it, such as 300MB.")]
Speedup = Annotated[float | None, typer.Option(help="Decode so many times as fast as the dense model in its type.")]
Tps = Annotated[float | None, typer.Option(help="Decode at least so many tokens per second.")]
DeviceProfile = Annotated[
    Path | None, typer.Option(help="Solve for the device on which bench --profile wrote this file.")
]
Layout = Annotated[
    str | None, typer.Option(help="auto (default: per-layer where the export holds it), per-layer or uniform.")
]
Align = Annotated[int | None, typer.Option(help="FFN widths are multiples of this.")]
Tokens = Annotated[int | None, typer.Option(help="Calibration tokens, shared by the dimensions.")]
Window = Annotated[int | None, typer.Option(help="Tokens of one calibration window.")]
Format = Annotated[list[str] | None, typer.Option(help="gguf, onnx or both with a comma; default: those of --quant.")]
Quant = Annotated[
    list[str] | None,
    typer.Option(help=f"Types, with commas; default q8_0. GGUF: {NAMES}. ONNX: {onnx_types.NAMES}."),
]
BlockSize = Annotated[int | None, typer.Option(help="Weights that share a scale in ONNX int4: 32 (default) or 128.")]
ZeroPoints = Annotated[
    bool | None, typer.Option("--zero-points/--symmetric", help="ONNX int4 with a fitted zero point in each block.")
]
OutputBits = Annotated[int | None, typer.Option(help="Bits of the output layer in ONNX int4: 8 (default) or 4.")]
TensorType = Annotated[list[str] | None, typer.Option(help="Type of single tensors, REGEX=TYPE; repeat.")]
Rounding = Annotated[str | None, typer.Option(help="auto (default): gptq in four bits, else imatrix; or nearest.")]
Measure = Annotated[bool | None, typer.Option("--measure/--no-measure", help="Measure dense and expert.")]
AgainstQuantization = Annotated[
    bool | None,
    typer.Option(
        "--against-quantization/--alone", help="Compare with the dense model in every type too, speed and all; long."
    ),
]
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


# The flags of `prune`, and with those after the stroke of `build`, by field of the recipe.
PRUNING = {
    "revision": Revision, "lang": Lang, "domain": Domain, "task": Task, "corpus": Corpus, "dim": Dim,
    "include": Include, "general": General, "weight": Weight, "method": Method, "combine": Combine, "widths": Widths,
    "form": Form, "vocab": Vocab, "ratio": Ratio, "epsilon": Epsilon, "layout": Layout, "align": Align,
    "tokens": Tokens, "window": Window, "recover": Recover, "recover_rank": RecoverRank,
    "recover_tokens": RecoverTokens, "recover_rate": RecoverRate, "seed": Seed, "device": Device,
}  # fmt: skip
BUILDING = {
    "model": Model, **PRUNING, "size": Size, "ram": Ram, "speedup": Speedup, "tps": Tps,
    "device_profile": DeviceProfile, "format": Format, "quant": Quant, "rounding": Rounding,
    "tensor_type": TensorType, "block_size": BlockSize, "zero_points": ZeroPoints, "output_bits": OutputBits,
    "measure": Measure, "against_quantization": AgainstQuantization,
    "eval_tokens": EvalTokens, "questions": Questions, "repetitions": Repetitions, "threads": Threads, "name": Name,
    "out": Out,
}  # fmt: skip


def takes(flags: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these flags, each None where it is not given; the command reads them from its context."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        named = [
            parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in flags.items()
        ]
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in named[1:]]
        command.__signature__ = own.replace(parameters=[named[0], *added, *keyword])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (named[0], *added, *keyword)}
        return command

    return decorate


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
