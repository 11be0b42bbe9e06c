"""A model folder in, one .gguf file out: streamed from safetensors tensor by tensor, then quantized by llama.cpp.

Layers of equal widths go into llama.cpp's architecture ``llama``, layers of their own widths into ``deci``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import gguf
import numpy as np

from cusprun.anatomy import Anatomy, describe, read_config
from cusprun.checkpoint import Weights
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import gguf_metadata, gguf_tensors, gguf_tokenizer
from cusprun.exporters.imatrix import read_imatrix
from cusprun.files import aside, sha256_file, written_whole
from cusprun.progress import say
from cusprun.quants import TYPES
from cusprun.runtimes import default_threads
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.gguf_header import TensorInfo, load_metadata

_FLOAT32 = np.dtype(np.float32)

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

    ``name`` goes into general.name (default: the folder's), ``metadata`` into the keys that gguf_metadata lists;
    ``imatrix`` is a file of :mod:`cusprun.exporters.imatrix` or llama.cpp's own, which the quantizer weighs errors by.
    ``overrides`` are pairs of a regular expression and the type of every tensor whose name in the file it is found in.
    ``out`` appears whole or not at all. Raises InvalidRequest where the request or the folder makes no sense, Failed
    naming the tensor where weights are not finite or do not fit.
    """
    if quant not in TYPES:
        raise InvalidRequest(f"quantization {quant!r} is unknown: write one of {', '.join(TYPES)}")
    if TYPES[quant].needs_imatrix and imatrix is None:
        raise InvalidRequest(f"{quant} needs an importance matrix: give one with --imatrix FILE, or text with --corpus")
    gguf_metadata.check_metadata(metadata or {})
    if imatrix is not None:
        read_imatrix(imatrix)
    source = _Source(model_dir, name or model_dir.resolve().name, metadata or {})
    _check_overrides(source, quant, overrides)
    try:
        with written_whole(out) as part:
            if TYPES[quant].plain:
                source.write(part, quant.upper(), file_type(quant))
            else:
                with _scratch(part) as whole:
                    source.write(whole, source.matrix_type, file_type(source.matrix_type.lower()))
                    run_in_child(
                        quantize_file, str(whole), str(part), int(file_type(quant)), threads or default_threads(),
                        str(imatrix) if imatrix is not None else None, overrides,
                    )  # fmt: skip
            info = load_metadata(part)
    except OSError as error:
        raise Failed(f"{out} could not be written: {error.strerror or error}") from error
    fallbacks = tuple(find_fallbacks(info.tensors, quant, overrides))
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


class _Source:
    """A checked model folder, ready to be written in any plain type."""

    def __init__(self, folder: Path, name: str, metadata: Mapping[str, str]) -> None:
        self.name, self.metadata = name, metadata
        self.config = read_config(folder)
        self.anatomy: Anatomy = describe(folder)
        self.weights = Weights(folder)
        self.weights.check(self.anatomy)
        if self.anatomy.head_dim % 2:
            raise InvalidRequest(f"{folder}: a head_dim of {self.anatomy.head_dim} cannot rotate in pairs")
        self.rope = gguf_tensors.read_rope(self.config, self.anatomy.head_dim)
        self.vocabulary = gguf_tokenizer.read_vocabulary(folder, self.anatomy.vocab_size, self.config)
        context = gguf_metadata.context_length(self.config)
        if context < int(self.config.get("max_position_embeddings") or context):
            say(f"{folder}: the context is cut to the sliding window of {context} tokens, which llama.cpp cannot slide")

    @property
    def matrix_type(self) -> str:
        """The plain type that loses nothing of the stored embedding's: F16, BF16 or F32."""
        stored = self.weights.dtype(self.anatomy.family.embedding)
        return stored if stored in ("F16", "BF16") else "F32"

    def write(self, path: Path, matrix_type: str, file_type: gguf.LlamaFileType) -> None:
        """Writes the file with matrices in ``matrix_type``; at most one tensor is in memory."""
        plans = gguf_tensors.plan_tensors(self.anatomy, matrix_type, self.rope.freqs)
        parameters = sum(prod(plan.shape) for plan in plans if plan.source is not None)
        writer = gguf.GGUFWriter(path, gguf_metadata.architecture(self.anatomy))
        try:
            gguf_metadata.write_general(writer, self.name, parameters, file_type, self.metadata)
            gguf_metadata.write_sizes(writer, self.anatomy, self.config, self.rope)
            gguf_tokenizer.write_vocabulary(writer, self.vocabulary)
            for plan in plans:
                kind = gguf.GGMLQuantizationType[plan.type]
                # The dtype only tells plain data from bytes here; raw_dtype is what is written.
                writer.add_tensor_info(plan.name, plan.shape, _FLOAT32, plan.bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for data in gguf_tensors.read_tensors(self.weights, plans, self.rope.freqs):
                writer.write_tensor_data(data)
        finally:
            writer.close()


def _check_overrides(source: _Source, quant: str, overrides: Sequence[tuple[str, str]]) -> None:
    """Raises InvalidRequest for overrides that nothing comes of."""
    if overrides and TYPES[quant].plain:
        raise InvalidRequest(f"--tensor-type changes what the quantizer does, and {quant} is written without it")
    names = [plan.name for plan in gguf_tensors.plan_tensors(source.anatomy, "F32", None) if len(plan.shape) == 2]
    for pattern, _ in overrides:
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
