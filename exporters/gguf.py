"""A model folder in, one .gguf file out: streamed from safetensors tensor by tensor, then quantized by llama.cpp.

Layers of equal widths go into llama.cpp's architecture ``llama``, layers of their own widths into ``deci``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import gguf_metadata
from cusprun.exporters.compensation import Compensated
from cusprun.exporters.gguf_prediction import Fallback, Prediction, file_type, predict_gguf, tensor_types
from cusprun.exporters.gguf_quantize import quantize_file
from cusprun.exporters.gguf_source import GgufSource, Rounding
from cusprun.exporters.gguf_split import split_gguf
from cusprun.exporters.grids import GRIDS, Grid
from cusprun.exporters.imatrix_file import read_imatrix
from cusprun.files import aside, sha256_file, written_whole
from cusprun.progress import say
from cusprun.quants import TYPES, is_weighed
from cusprun.runtimes import default_threads
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.gguf_header import load_metadata

OUTER = ("token_embd.weight", "output.weight")  # matrices outside the layers


@dataclass(frozen=True)
class GgufReport:
    """What was written."""

    path: Path  # of a split file its first part
    quant: str
    arch: str
    bytes: int
    sha256: str  # of ``path``
    parts: tuple[Path, ...]
    parameters: int
    tokenizer_pre: str
    types: dict[str, str] = field(repr=False)  # tensor -> type
    fallbacks: tuple[Fallback, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge export --json` prints."""
        return {
            "path": str(self.path),
            "format": "gguf",
            "quant": self.quant,
            "arch": self.arch,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "parts": [
                {"path": str(part), "bytes": part.stat().st_size, "sha256": sha256_file(part)} for part in self.parts
            ],
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
        }

    def as_lines(self) -> list[str]:
        """What `cusprun-edge export` prints."""
        return [f"{part}  {part.stat().st_size / 2**20:.1f} MiB  {self.arch}" for part in self.parts]


def export_gguf(
    model_dir: Path,
    out: Path,
    quant: str,
    *,
    name: str | None = None,
    metadata: gguf_metadata.Metadata | None = None,
    imatrix: Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    threads: int | None = None,
) -> GgufReport:
    """Writes the model folder ``model_dir`` to ``out`` as ``quant``, one of :data:`cusprun.quants.TYPES`.

    ``imatrix`` is a file of :mod:`cusprun.exporters.imatrix` or llama.cpp's own, which the quantizer weighs errors by;
    the rest is :class:`GgufExport`'s. ``out`` appears whole or not at all. Raises InvalidRequest where the request or
    the folder makes no sense, Failed naming the tensor where weights are not finite or do not fit.
    """
    export = GgufExport(
        model_dir, quant, name=name, metadata=metadata, overrides=overrides, weighed=imatrix is not None
    )
    return export.write(out, imatrix, threads)


class GgufExport:
    """A request for one file that was checked in all that needs no work.

    ``name`` goes into general.name (default: the folder's), ``metadata`` into the keys that gguf_metadata lists;
    ``overrides`` are pairs of a regular expression and the type of every tensor whose name in the file it is found in;
    ``weighed`` says that there will be an importance matrix. Raises InvalidRequest where the request or the folder
    makes no sense.
    """

    def __init__(
        self,
        model_dir: Path,
        quant: str,
        *,
        name: str | None = None,
        metadata: gguf_metadata.Metadata | None = None,
        overrides: Sequence[tuple[str, str]] = (),
        weighed: bool = False,
    ) -> None:
        if quant not in TYPES:
            raise InvalidRequest(f"quantization {quant!r} is unknown: write one of {', '.join(TYPES)}")
        if TYPES[quant].needs_imatrix and not weighed:
            raise InvalidRequest(
                f"{quant} needs an importance matrix: give one with --imatrix FILE, or text with --corpus"
            )
        if weighed and not is_weighed(quant) and not overrides:
            raise InvalidRequest(
                f"{quant} is rounded the same with an importance matrix and without: leave it out, or choose a type "
                "below eight bits"
            )
        gguf_metadata.check_metadata(metadata or {})
        self.quant, self.overrides, self.weighed = quant, tuple(overrides), weighed
        self.source = GgufSource(model_dir, name or model_dir.resolve().name, metadata or {})
        self._check_overrides()

    def check_imatrix(self, path: Path) -> None:
        """Raises InvalidRequest where ``path`` is no importance matrix of this model."""
        found, matrices = read_imatrix(path), self.source.matrices()
        for name, shape in matrices.items():
            if name in found and found[name].size != shape[-1]:
                raise InvalidRequest(
                    f"{path} is of another model: {name} has {found[name].size} columns there and {shape[-1]} here"
                )
        lost = [name for name in matrices if name not in found and name not in OUTER]
        if lost and TYPES[self.quant].needs_imatrix:
            raise InvalidRequest(f"{path} lacks {lost[0]}, and {self.quant} needs every matrix of the layers in it")

    @cached_property
    def prediction(self) -> Prediction:
        """What the file will be. Raises Failed where llama.cpp refuses the model."""
        return predict_gguf(self.source, self.quant, self.overrides, weighed=self.weighed)

    def write(
        self,
        out: Path,
        imatrix: Path | None = None,
        threads: int | None = None,
        split_max: int | None = None,
        compensated: Compensated | None = None,
    ) -> GgufReport:
        """Writes the file to ``out``, whole or not at all; where it has more than ``split_max`` bytes, its parts.

        ``compensated`` are matrices on the grids of :attr:`grids`, which are taken as they are. Raises Failed naming
        the tensor where weights are not finite or do not fit, or where the file is not what was predicted.
        """
        if imatrix is not None:
            self.check_imatrix(imatrix)
        try:
            for line in self.prediction.fallback_lines():
                say(line)
            if split_max is None or self.prediction.bytes <= split_max:
                with written_whole(out) as part:
                    self._write_checked(part, imatrix, threads, compensated)
            else:
                out.parent.mkdir(parents=True, exist_ok=True)
                with _scratch(out) as whole:
                    self._write_checked(whole, imatrix, threads, compensated)
                    out = split_gguf(whole, out, split_max)[0]
            info = load_metadata(out)
        except OSError as error:
            raise Failed(f"{out} could not be written: {error.strerror or error}") from error
        return GgufReport(
            path=out,
            quant=self.quant,
            arch=info.architecture,
            bytes=info.file_bytes,
            sha256=sha256_file(out),
            parts=info.parts,
            parameters=info.parameters,
            tokenizer_pre=self.source.vocabulary.pre,
            types={tensor.name: tensor.type for tensor in info.tensors},
            fallbacks=self.prediction.fallbacks,
        )

    def _write_checked(
        self, part: Path, imatrix: Path | None, threads: int | None, compensated: Compensated | None
    ) -> None:
        self._write_whole(part, imatrix, threads, compensated)
        self.prediction.check(load_metadata(part))

    def _write_whole(
        self, part: Path, imatrix: Path | None, threads: int | None, compensated: Compensated | None
    ) -> None:
        source, matrices = self.source, self.source.matrices()
        kind = file_type(self.quant, matrices)
        if TYPES[self.quant].plain:
            source.write(part, self.quant.upper(), kind)
            return
        types, _ = tensor_types(matrices, self.quant, self.overrides)
        weights = str(imatrix) if imatrix is not None else None
        rounded = Rounding(compensated, self.prediction.types) if compensated is not None else None
        with _scratch(part) as whole:  # the quantizer copies what has its type already
            source.write(whole, source.matrix_type, file_type(source.matrix_type.lower(), matrices), rounded)
            run_in_child(quantize_file, str(whole), str(part), int(kind), threads or default_threads(), weights, types)

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The folder's matrices that can be rounded with compensation, in the types that the file will have them in."""
        kinds = {plan: self.prediction.types[plan.name].lower() for plan in self.source.tensors("F32")}
        return {
            source: GRIDS[kind]
            for plan, kind in kinds.items()
            if kind in GRIDS and plan.name not in OUTER
            for source in plan.sources
        }

    def _check_overrides(self) -> None:
        """Raises InvalidRequest for overrides that nothing comes of."""
        if self.overrides and TYPES[self.quant].plain:
            raise InvalidRequest(
                f"--tensor-type changes what the quantizer does, and {self.quant} is written without it"
            )
        names = list(self.source.matrices())
        for pattern, _ in self.overrides:
            if not any(re.search(pattern, name) for name in names):
                raise InvalidRequest(
                    f"--tensor-type {pattern}=…: no matrix has such a name; there are {', '.join(names[:9])} …"
                )


@contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A temporary file on the same disk that is gone when the block ends, however it ends."""
    path = aside(beside)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
