"""What `cusprun-edge export` asks for: a model folder in any number of types, of GGUF and of ONNX, each file proved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cusprun.as_llama import as_llama
from cusprun.checkpoint import load_tokenizer
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.compensation import Compensated, Roundings
from cusprun.exporters.gguf import GgufReport
from cusprun.exporters.gguf_prediction import Prediction
from cusprun.exporters.gguf_request import GgufRequest, name_of
from cusprun.exporters.grids import GRIDS
from cusprun.exporters.imatrix import read_windows
from cusprun.exporters.onnx import OnnxExport, OnnxPrediction, OnnxReport
from cusprun.exporters.proof import HARD_STRINGS, Proof, prove_gguf, prove_onnx
from cusprun.files import aside
from cusprun.formats import Rounding, format_of, parse_rounding, resolve, rounding_of
from cusprun.quants import is_weighed

PROOF_TOKENS = 256  # of each window


@dataclass(frozen=True)
class Settings:
    """Everything that is not the same for every export; see the flags of `cusprun-edge export`."""

    name: str | None = None
    rounding: str | None = None  # default: auto where there is text, imatrix where there is one, else nearest
    imatrix: Path | None = None
    corpus: Path | None = None
    tokens: int = 16384
    tensor_types: Sequence[str] = ()
    split_max_size: str | None = None
    block_size: int = 32
    zero_points: bool = False
    output_bits: int = 8
    context: int | None = None
    threads: int | None = None
    prove: bool = True

    @property
    def how(self) -> Rounding:
        """How types are rounded that have a choice. Raises InvalidRequest for a rounding that does not exist."""
        return parse_rounding(self.rounding, imatrix=self.imatrix is not None, corpus=self.corpus is not None)


@dataclass(frozen=True)
class Exported:
    """One artifact with the proof that it is the model, None where none was wanted."""

    report: GgufReport | OnnxReport
    proof: Proof | None
    rounding: Rounding

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge export --json` prints."""
        return {
            **self.report.as_json(),
            "rounding": self.rounding,
            "proof": self.proof.as_dict() if self.proof else None,
        }

    def as_lines(self) -> list[str]:
        """What `cusprun-edge export` prints."""
        lines = self.report.as_lines()
        if self.proof is not None:
            proof = self.proof
            lines.append(
                f"  against torch on {proof.tokens} tokens: the same first choice {proof.top1_agreement:.1%}, "
                f"KL divergence {proof.kld_mean:.2g} nats"
            )
        return lines


Planned = Prediction | OnnxPrediction


def export_model(
    model: Path, out: Path, formats: Sequence[str], types: Sequence[str], settings: Settings, *, dry_run: bool = False
) -> list[Exported] | list[Planned]:
    """Writes the model folder ``model`` in every type that ``formats`` and ``types`` come to.

    One type goes to ``out`` itself: a .gguf or a folder for it, or the ONNX folder. Several go below it, each .gguf
    under its name and each ONNX folder under its type. Everything is checked before anything is written; each artifact
    is run by its own runtime beside torch before it gets its name. With ``dry_run`` nothing is written and what would
    be is returned. Raises InvalidRequest where something makes no sense or is in the way, Failed where an artifact is
    not the model.
    """
    if not (model / "config.json").is_file():
        inside = model / "model"
        raise InvalidRequest(
            f"{model} is an expert: name the model folder in it, {inside}"
            if (inside / "config.json").is_file()
            else f"export takes a model folder (config.json and safetensors), and {model} is none: "
            "`cusprun-edge build` and `prune` write one, a model of the hub comes with `hf download`"
        )
    quants = resolve(formats, types)
    several = len(quants) > 1
    if several and out.suffix == ".gguf":
        raise InvalidRequest(f"--out {out} is one file and {len(quants)} types were asked for: name a folder")
    _check_rounding(quants, settings)
    _check_flags(quants, settings)
    planned = [_plan(model, out, quant, several, settings) for quant in quants]
    shared = Shared(model, out, settings)
    if dry_run:
        return [plan for plan, _ in planned]
    return [write(shared) for _, write in planned]


class Shared:
    """What is taken of the corpus once and serves every type of a request that has a use for it.

    The corpus is read here: raises InvalidRequest where it is missing, in no form that is read, or too short.
    """

    def __init__(self, model: Path, out: Path, settings: Settings) -> None:
        self.imatrix: Path | None = None
        folder, corpus = as_llama(model), settings.corpus
        existing = next(parent for parent in out.absolute().parents if parent.is_dir())
        windows = {} if corpus is None else read_windows(folder, corpus, settings.tokens)
        self._roundings = Roundings(folder, lambda: windows, existing)

    def compensated(self, rounding: Rounding, export: GgufRequest | OnnxExport) -> Compensated | None:
        """The matrices that an export takes as they are; None where it is rounded otherwise."""
        return self._roundings.for_export(rounding, export)


def _check_rounding(quants: Sequence[str], settings: Settings) -> None:
    """Raises InvalidRequest where the rounding that is asked for cannot be, or changes nothing."""
    if settings.imatrix is not None and settings.corpus is not None:
        raise InvalidRequest("--imatrix and --corpus are two ways to the same: give one")
    weighed, rounding = settings.imatrix is not None or settings.corpus is not None, settings.how
    if rounding == "nearest" and weighed:
        raise InvalidRequest("--rounding nearest has no use for --imatrix or --corpus: leave them out")
    if rounding == "imatrix" and not weighed:
        raise InvalidRequest("--rounding imatrix needs --corpus TEXT or --imatrix FILE")
    if rounding in ("auto", "gptq") and settings.corpus is None:
        raise InvalidRequest(f"--rounding {rounding} needs text to round by: give it with --corpus TEXT")
    if rounding == "gptq":
        if settings.zero_points:
            raise InvalidRequest("--rounding gptq is written for symmetric blocks: leave --zero-points out")
        if "gptq" not in [_how(quant, settings) for quant in quants]:
            raise InvalidRequest(
                f"--rounding gptq changes nothing in {', '.join(quants)}: it is for int4 and quantized types of GGUF"
            )


def _how(quant: str, settings: Settings) -> Literal["nearest", "imatrix", "gptq"]:
    return rounding_of(quant, settings.how, zero_points=settings.zero_points)


def _check_flags(quants: Sequence[str], settings: Settings) -> None:
    """Raises InvalidRequest for flags that no type of the request has a use for."""
    gguf = [quant for quant in quants if format_of(quant) == "gguf"]
    weighed = [quant for quant in gguf if is_weighed(quant)]
    compensated = [quant for quant in quants if _how(quant, settings) == "gptq"]
    given = {
        "--tensor-type": (settings.tensor_types, gguf, "a type of GGUF"),
        "--split-max-size": (settings.split_max_size, gguf, "a type of GGUF"),
        "--imatrix": (settings.imatrix, weighed, "a type of GGUF below eight bits"),
        "--corpus": (settings.corpus, weighed or compensated, "a type of GGUF below eight bits and for int4"),
        "--block-size": (settings.block_size != 32, "int4" in quants, "int4"),
        "--zero-points": (settings.zero_points, "int4" in quants, "int4"),
        "--output-bits": (settings.output_bits != 8, "int4" in quants, "int4"),
        "--context": (settings.context, len(gguf) < len(quants), "a type of ONNX"),
    }
    for flag, (value, used, wanted) in given.items():
        several = len(quants) > 1
        if value and not used and (several or format_of(quants[0]) == "onnx" or flag not in ("--imatrix", "--corpus")):
            raise InvalidRequest(f"{flag} changes nothing in {', '.join(quants)}: it is for {wanted}")


def _plan(
    model: Path, out: Path, quant: str, several: bool, settings: Settings
) -> tuple[Planned, Callable[[Shared], Exported]]:
    """What the export in one type will be, and what writes it."""
    name, rounding = settings.name or name_of(model), _how(quant, settings)
    if format_of(quant) == "onnx":
        target = out / quant if several else out
        if target.exists():
            raise InvalidRequest(f"--out {target} exists; choose another name or remove it")
        export = OnnxExport(
            as_llama(model), quant, name=name, context=settings.context, block_size=settings.block_size,
            symmetric=not settings.zero_points, output_bits=settings.output_bits,
        )  # fmt: skip
        return export.prediction, lambda shared: _write_onnx(export, target, rounding, settings, shared)
    single = rounding != "gptq" and not several  # says itself that it has no use for one
    weighed = settings.how != "nearest" and (single or is_weighed(quant))
    request = GgufRequest(
        model, out, quant, name=name, imatrix=settings.imatrix if weighed else None,
        corpus=settings.corpus if weighed else None, tokens=settings.tokens, tensor_types=settings.tensor_types,
        split_max_size=settings.split_max_size,
    )  # fmt: skip
    if settings.how == "gptq" and rounding == "gptq" and not request.grids:
        raise InvalidRequest(
            f"--rounding gptq changes nothing in {quant}: no matrix would be of type {', '.join(GRIDS)}"
        )
    return request.prediction, lambda shared: _write_gguf(request, rounding, weighed, settings, shared)


def _write_gguf(
    request: GgufRequest, rounding: Rounding, weighed: bool, settings: Settings, shared: Shared
) -> Exported:
    target, matrix = request.target, shared.imatrix if weighed else None
    compensated = shared.compensated(rounding, request)
    with _beside(target) as folder:
        folder.mkdir(parents=True)
        report = request.write(folder / target.name, imatrix=matrix, threads=settings.threads, compensated=compensated)
        proof = None
        if settings.prove:
            proof = prove_gguf(report.path, request.folder, proof_windows(request.folder), threads=settings.threads)
        # The first part last: no other is opened without it.
        for file in sorted(folder.iterdir(), key=lambda file: (file == report.path, file.name)):
            os.replace(file, target.with_name(file.name))
        taken = target.with_suffix(".imatrix")
        if shared.imatrix is None and settings.corpus is not None and taken.is_file():
            shared.imatrix = taken
        moved = tuple(target.with_name(part.name) for part in report.parts)
        rounded: Rounding = "gptq" if compensated else "imatrix" if weighed else "nearest"
        return Exported(replace(report, path=target.with_name(report.path.name), parts=moved), proof, rounded)


def _write_onnx(export: OnnxExport, target: Path, rounding: Rounding, settings: Settings, shared: Shared) -> Exported:
    compensated = shared.compensated(rounding, export)
    with _beside(target) as folder:
        report = export.write(folder, compensated)
        proof = None
        if settings.prove:
            windows = proof_windows(export.model_dir, report.context)
            proof = prove_onnx(folder, export.model_dir, export.quant, windows, threads=settings.threads)
        os.rename(folder, target)
        return Exported(replace(report, path=target), proof, rounding)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder's name beside ``target`` to write to; whatever is left of it, and empty folders made for it, go."""
    folder = aside(target)
    made = [parent for parent in target.absolute().parents if not parent.exists()]  # the innermost first
    try:
        yield folder
    except OSError as error:
        raise Failed(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds what was written
                parent.rmdir()


def proof_windows(model_dir: Path, most: int = PROOF_TOKENS) -> np.ndarray:
    """Token ids that every tokenizer has, (2, window): text in several scripts that is part of this program."""
    ids = load_tokenizer(model_dir)("\n".join(HARD_STRINGS), add_special_tokens=False)["input_ids"]
    window = min(PROOF_TOKENS, most, len(ids) // 2)
    return np.array(ids[: 2 * window], dtype=np.int64).reshape(2, window)


def tell(found: Sequence[Exported] | Sequence[Planned]) -> Any:
    """The JSON document of an export: one artifact's object, or a list of them under ``artifacts``."""
    rows = [one.as_json() for one in found]
    return rows[0] if len(rows) == 1 else {"artifacts": rows}
