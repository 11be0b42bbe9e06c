"""A model folder in, one .gguf file out: streamed from safetensors tensor by tensor, then quantized by llama.cpp.

Layers of equal widths go into llama.cpp's architecture ``llama``, layers of their own widths into ``deci``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gguf

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import gguf_metadata
from cusprun.exporters.gguf_source import GgufSource
from cusprun.exporters.imatrix import read_imatrix
from cusprun.files import aside, sha256_file, written_whole
from cusprun.progress import say
from cusprun.quants import TYPES, is_weighed
from cusprun.runtimes import default_threads
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.gguf_header import TensorInfo, load_metadata

OUTER = ("token_embd.weight", "output.weight")  # matrices outside the layers
SUPER_BLOCK = 256  # row length that K-quants need
BLOCK = 32  # row length that the other quantized types need


@dataclass(frozen=True)
class Fallback:
    """A tensor that got another type than its row length would have had to allow."""

    tensor: str
    columns: int
    wanted: str
    got: str


@dataclass(frozen=True)
class GgufReport:
    """What was written."""

    path: Path
    quant: str
    arch: str
    bytes: int
    sha256: str
    parameters: int
    tokenizer_pre: str
    types: dict[str, str] = field(repr=False)  # tensor -> type
    fallbacks: tuple[Fallback, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge export --json` prints."""
        return {
            "path": str(self.path),
            "quant": self.quant,
            "arch": self.arch,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
        }


def export_gguf(
    model_dir: Path,
    out: Path,
    quant: str,
    *,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
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
        metadata: Mapping[str, str] | None = None,
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

    def write(self, out: Path, imatrix: Path | None = None, threads: int | None = None) -> GgufReport:
        """Writes the file to ``out``, whole or not at all.

        Raises Failed naming the tensor where weights are not finite or do not fit.
        """
        source, quant = self.source, self.quant
        if imatrix is not None:
            self.check_imatrix(imatrix)
        try:
            with written_whole(out) as part:
                if TYPES[quant].plain:
                    source.write(part, quant.upper(), file_type(quant))
                else:
                    with _scratch(part) as whole:
                        source.write(whole, source.matrix_type, file_type(source.matrix_type.lower()))
                        run_in_child(
                            quantize_file, str(whole), str(part), int(file_type(quant)), threads or default_threads(),
                            str(imatrix) if imatrix is not None else None, self.overrides,
                        )  # fmt: skip
                info = load_metadata(part)
        except OSError as error:
            raise Failed(f"{out} could not be written: {error.strerror or error}") from error
        fallbacks = tuple(find_fallbacks(info.tensors, quant, self.overrides))
        if fallbacks:
            say(f"{out.name}: larger type for rows that do not divide into blocks, in tensors: {len(fallbacks)}")
        return GgufReport(
            path=out,
            quant=quant,
            arch=info.architecture,
            bytes=info.file_bytes,
            sha256=sha256_file(out),
            parameters=info.parameters,
            tokenizer_pre=source.vocabulary.pre,
            types={tensor.name: tensor.type for tensor in info.tensors},
            fallbacks=fallbacks,
        )

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


def quantize_file(
    source: str,
    out: str,
    file_type: int,
    threads: int,
    imatrix: str | None = None,
    overrides: Sequence[Sequence[str]] = (),
) -> None:
    """Quantizes one .gguf into another with llama.cpp; runs in a child process, for llama.cpp may abort.

    Raises Failed with llama.cpp's reason.
    """
    import ctypes
    import os

    import llama_cpp

    from cusprun.runtimes import llamacpp

    llamacpp.quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads
    if imatrix is not None:
        means = read_imatrix(Path(imatrix))
        entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the last, empty one ends the list
        for entry, (name, values) in zip(entries, means.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    if overrides:
        changes = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for change, (pattern, kind) in zip(changes, overrides, strict=False):
            change.pattern, change.type = pattern.encode(), int(gguf.GGMLQuantizationType[kind.upper()])
        parameters.tt_overrides = changes
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters)) != 0:
        raise Failed(f"llama.cpp does not quantize {source}: {llamacpp.logged()}")


def find_fallbacks(
    tensors: tuple[TensorInfo, ...], quant: str, overrides: Sequence[tuple[str, str]] = ()
) -> Iterator[Fallback]:
    """The tensors of a quantized file whose rows do not divide into the blocks of the type meant for them."""
    if TYPES[quant].plain:
        return
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    output = "token_embd.weight" if tied else "output.weight"
    for tensor in tensors:
        columns = tensor.shape[-1]
        if len(tensor.shape) != 2 or columns % SUPER_BLOCK == 0:
            continue
        if (wish := next((kind for pattern, kind in overrides if re.search(pattern, tensor.name)), None)) is not None:
            if tensor.type != wish.upper():
                yield Fallback(tensor.name, columns, wish.upper(), tensor.type)
            continue
        meant = TYPES[quant].stand_ins
        if tensor.name == output:
            meant = {**meant, **TYPES[quant].output_stand_ins}
        if columns % BLOCK:
            yield Fallback(tensor.name, columns, quant.upper(), tensor.type)
        elif tensor.type in meant:
            yield Fallback(tensor.name, columns, meant[tensor.type], tensor.type)


def file_type(quant: str) -> gguf.LlamaFileType:
    """llama.cpp's number of a type."""
    return gguf.LlamaFileType[TYPES[quant].file_type]


@contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A temporary file on the same disk that is gone when the block ends, however it ends."""
    path = aside(beside)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
