"""Flags that several commands share: those of `build` and `prune`, each a field of the recipe, and `--json`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cusprun import completion, onnx_types
from cusprun.quants import NAMES


def option(said: str, value: str | None = None, offered: completion.Completer | None = None) -> Any:
    """An option with its help, a word for its value, and what the shell completes it to."""
    return typer.Option(help=said, metavar=value, autocompletion=offered)


Model = Annotated[
    str | None, option("Dense model: a folder, a .gguf, a hub id, or the default.", "MODEL", completion.models)
]
Revision = Annotated[str | None, option("Commit or tag of a hub model.", "REVISION")]
Lang = Annotated[str | None, option("Language of the scenario: en de fr es it pt.", "LANG", completion.languages)]
Domain = Annotated[str | None, option("Domain: legal medical science software general.", "DOMAIN", completion.domains)]
Task = Annotated[str | None, option("Task: qa summarization classification translation.", "TASK", completion.tasks)]
Corpus = Annotated[list[str] | None, option("Your own text, FILE[:weight]; may be repeated.", "FILE[:WEIGHT]")]
Dim = Annotated[list[str] | None, option("A further dimension, NAME=FILE; may be repeated.", "NAME=FILE")]
Include = Annotated[list[str] | None, option("A catalog entry not used by itself.", "ENTRY", completion.entries)]
General = Annotated[float | None, typer.Option(help="Share of the calibration text that is general; default 0.125.")]
Weight = Annotated[list[str] | None, option("A dimension's weight, NAME=NUMBER; may be repeated.", "NAME=NUMBER")]
Method = Annotated[
    str | None,
    option(
        "refit (default); cus-prun llm-pruner llm-pruner-vector llm-pruner-element2 llm-pruner-mix flap "
        "wanda-sp slicegpt shortgpt magnitude random.",
        "METHOD",
        completion.field("method"),
    ),
]
Combine = Annotated[
    str | None, option("intersection, mixture or max of the dimensions.", "HOW", completion.field("combine"))
]
Widths = Annotated[str | None, option("Where refit cuts: measured, scores or even.", "HOW", completion.field("widths"))]
Form = Annotated[str | None, option("Refit joint (default), sequential or parallel.", "FORM", completion.field("form"))]
Vocab = Annotated[
    str | None, option("Tokens that stay: keep, auto (default) or a number.", "TOKENS", completion.vocabularies)
]
Recover = Annotated[
    str | None, option("Train after the cut: lora or distill; default: not at all.", "HOW", completion.field("recover"))
]
RecoverRank = Annotated[int | None, typer.Option(help="Rank of the adapters.")]
RecoverTokens = Annotated[int | None, typer.Option(help="Tokens that recovery reads in all.")]
RecoverSteps = Annotated[int | None, typer.Option(help="Updates of recovery; default: one for each window.")]
RecoverRate = Annotated[float | None, typer.Option(help="Learning rate of recovery.")]
Ratio = Annotated[float | None, typer.Option(help="Share of all parameters that goes; default 0.25.")]
Epsilon = Annotated[float | None, typer.Option(help="Remove what changes a layer by no more than this.")]
Size = Annotated[str | None, option("Instead of a ratio: the file's size at most, such as 60MB.", "BYTES")]
Ram = Annotated[str | None, option("Peak memory at most of the process that runs it, such as 300MB.", "BYTES")]
Speedup = Annotated[float | None, typer.Option(help="Decode so many times as fast as the dense model in its type.")]
Tps = Annotated[float | None, typer.Option(help="Decode at least so many tokens per second.")]
DeviceProfile = Annotated[Path | None, option("Solve for the device on which bench --profile wrote this file.", "FILE")]
Layout = Annotated[
    str | None,
    option(
        "auto (default: per-layer where the export holds it), per-layer or uniform.",
        "LAYOUT",
        completion.field("layout"),
    ),
]
Align = Annotated[int | None, typer.Option(help="FFN widths are multiples of this.")]
Tokens = Annotated[int | None, typer.Option(help="Calibration tokens, shared by the dimensions.")]
Window = Annotated[int | None, typer.Option(help="Tokens of one calibration window.")]
Format = Annotated[
    list[str] | None,
    option("gguf, onnx or both with a comma; default: those of --quant.", "FORMAT", completion.formats),
]
Quant = Annotated[
    list[str] | None,
    option(f"Types, with commas; default q8_0. GGUF: {NAMES}. ONNX: {onnx_types.NAMES}.", "TYPE", completion.types),
]
BlockSize = Annotated[
    int | None,
    option("Weights that share a scale in ONNX int4: 32 (default) or 128.", None, completion.field("block_size")),
]
ZeroPoints = Annotated[
    bool | None, typer.Option("--zero-points/--symmetric", help="ONNX int4 with a fitted zero point in each block.")
]
OutputBits = Annotated[
    int | None,
    option("Bits of the output layer in ONNX int4: 8 (default) or 4.", None, completion.field("output_bits")),
]
TensorType = Annotated[list[str] | None, option("Type of single tensors, REGEX=TYPE; repeat.", "REGEX=TYPE")]
Rounding = Annotated[
    str | None,
    option("auto (default): gptq in four bits, else imatrix; or nearest.", "HOW", completion.field("rounding")),
]
Measure = Annotated[bool | None, typer.Option("--measure/--no-measure", help="Measure dense and expert.")]
AgainstQuantization = Annotated[
    bool | None,
    typer.Option(
        "--against-quantization/--alone", help="Compare with the dense model in every type that rounds too; long."
    ),
]
EvalTokens = Annotated[int | None, typer.Option(help="Tokens of each evaluation text.")]
Questions = Annotated[int | None, typer.Option(help="Most multiple-choice questions to ask.")]
Repetitions = Annotated[int | None, typer.Option(help="Speed runs of each artifact.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling of text.")]
Device = Annotated[str | None, option("cpu or cuda.", "DEVICE", completion.devices)]
Threads = Annotated[int | None, typer.Option(help="Threads of measurements; default: physical cores.")]
Name = Annotated[str | None, option("Name of the expert.", "NAME")]
Out = Annotated[Path | None, option("Folder of the expert; default experts/<name>.", "DIR")]
Recipe = Annotated[Path | None, option("A recipe.yaml to replay; other flags override it.", "FILE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


# The flags of `prune`, and with those after the stroke of `build`, by field of the recipe.
PRUNING = {
    "revision": Revision, "lang": Lang, "domain": Domain, "task": Task, "corpus": Corpus, "dim": Dim,
    "include": Include, "general": General, "weight": Weight, "method": Method, "combine": Combine, "widths": Widths,
    "form": Form, "vocab": Vocab, "ratio": Ratio, "epsilon": Epsilon, "layout": Layout, "align": Align,
    "tokens": Tokens, "window": Window, "recover": Recover, "recover_rank": RecoverRank,
    "recover_tokens": RecoverTokens, "recover_steps": RecoverSteps, "recover_rate": RecoverRate, "seed": Seed,
    "device": Device,
}  # fmt: skip
BUILDING = {
    "model": Model, **PRUNING, "size": Size, "ram": Ram, "speedup": Speedup, "tps": Tps,
    "device_profile": DeviceProfile, "format": Format, "quant": Quant, "rounding": Rounding,
    "tensor_type": TensorType, "block_size": BlockSize, "zero_points": ZeroPoints, "output_bits": OutputBits,
    "measure": Measure, "against_quantization": AgainstQuantization,
    "eval_tokens": EvalTokens, "questions": Questions, "repetitions": Repetitions, "threads": Threads, "name": Name,
    "out": Out,
}  # fmt: skip

# What belongs together in the help of `build` and `prune`.
SUBJECTS = {
    "Model and scenario": ("model", "revision", "lang", "domain", "task"),
    "Text": ("corpus", "dim", "include", "general", "weight", "tokens", "window", "seed"),
    "How much goes": ("ratio", "size", "ram", "speedup", "tps", "device_profile", "epsilon"),
    "What goes": ("method", "combine", "widths", "form", "vocab", "layout", "align"),
    "Training after the cut": ("recover", "recover_rank", "recover_tokens", "recover_steps", "recover_rate"),
    "Files": ("format", "quant", "rounding", "tensor_type", "block_size", "zero_points", "output_bits"),
    "Measurements": ("measure", "against_quantization", "eval_tokens", "questions", "repetitions", "threads"),
    "Options": ("out", "name", "recipe", "device", "json_"),
}


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
