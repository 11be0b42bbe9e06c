"""Reads the header of a GGUF file, and only that: what is in it, and whether it can be handed to llama.cpp at all.

llama.cpp aborts the process on some damaged files, so every count, length and offset is held against the file's size
first. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from cusprun.anatomy import LayerWidths
from cusprun.errors import Failed, InvalidRequest

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
LONG_ARRAY = 4096  # arrays beyond this (vocabulary, merges, scores) are walked over and kept as their length


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; ``shape`` in torch's order, rows first."""

    name: str
    shape: tuple[int, ...]
    type: str  # F32, F16, Q8_0, ...
    offset: int  # bytes from the start of its file's data
    bytes: int


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file says about itself."""

    path: Path
    architecture: str
    name: str | None
    quant: str  # general.file_type in lower case: f32, q8_0, q4_k_m, ...
    file_bytes: int  # of all parts
    parameters: int
    vocab_size: int
    hidden_size: int
    head_dim: int
    context_length: int
    layers: tuple[LayerWidths, ...]
    tied: bool
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, Any]  # long arrays are replaced by their length
    parts: tuple[Path, ...]  # the file, or every file of one that is split

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(Counter(tensor.type for tensor in self.tensors))

    @property
    def macs_per_token(self) -> int:
        """Multiplications with weights for one token: every matrix once, the embedding only where it is the output.

        Attention scores are left out: they depend on the context, not on the file.
        """
        matrices = (tensor for tensor in self.tensors if len(tensor.shape) == 2)
        return sum(prod(t.shape) for t in matrices if self.tied or t.name != "token_embd.weight")


def load_metadata(path: Path) -> GgufInfo:
    """The header of ``path``, of a split file's first part those of all parts together.

    Raises InvalidRequest where it is no GGUF file or another part than the first, Failed where it is a damaged one or
    a part is missing.
    """
    metadata, tensors, size = _read_part(path)
    parts = [path]
    for part in _other_parts(path, metadata):
        if not part.is_file():
            raise Failed(f"{path} is one part of a split file, and {part} is missing")
        _, more, more_size = _read_part(part)
        tensors, size = tensors + more, size + more_size
        parts.append(part)
    if len(parts) > 1 and len({tensor.name for tensor in tensors}) != metadata.get("split.tensors.count"):
        raise Failed(
            f"{path}: the parts of this split file do not belong together: their tensors are not those it counts"
        )
    return _describe(path, size, metadata, tensors, tuple(parts))


def part_path(whole: Path, index: int, count: int) -> Path:
    """The name of a part, from 0, of a file that is split, as llama.cpp's gguf-split gives it."""
    return whole.with_name(f"{whole.stem}-{index + 1:05d}-of-{count:05d}.gguf")


def _other_parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The parts behind the first, none where the file is not split."""
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 0)
    if count in (0, 1):
        return []
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})", path.stem)
    if named is None or (int(named[2]) - 1, int(named[3])) != (number, count):
        raise Failed(f"{path} is part {number!r} of {count!r} by its header and not by its name: give it its name back")
    whole = path.with_name(f"{named[1]}.gguf")
    if number != 0:
        raise InvalidRequest(
            f"{path} is part {number + 1} of a split file: name the first, {part_path(whole, 0, count)}"
        )
    return [part_path(whole, index, count) for index in range(1, count)]


def _read_part(path: Path) -> tuple[dict[str, Any], tuple[TensorInfo, ...], int]:
    """Metadata, tensors and size of one file."""
    if not path.is_file():
        raise InvalidRequest(f"{path} is not a file")
    size = path.stat().st_size
    if size < 24:
        raise InvalidRequest(f"{path} is not a GGUF file: it has {size} bytes, less than a GGUF header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise InvalidRequest(f"{path} is not a GGUF file: it starts with {data[:4]!r}, not with b'GGUF'")
        metadata, tensors, start, _ = _Reader(path, data).header()
    for tensor in tensors:
        end = start + tensor.offset + tensor.bytes
        if end > size:
            raise Failed(f"{path} is truncated: tensor {tensor.name} ends at byte {end} and the file has {size}")
    return metadata, tensors, size


def read_layout(path: Path) -> tuple[int, range, tuple[TensorInfo, ...], int]:
    """Of a whole GGUF file: entries of metadata, the bytes they lie in, the tensors, where their data starts."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        metadata, tensors, start, end = _Reader(path, data).header()
    return len(metadata), range(24, end), tensors, start


class _Reader:
    """Walks the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 4
        self._where = "the header"

    def header(self) -> tuple[dict[str, Any], tuple[TensorInfo, ...], int, int]:
        """Metadata, tensors, where the tensors' data starts and where the metadata ends."""
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise InvalidRequest(f"{self._path} is GGUF version {version}; versions 2 and 3 (little endian) are read")
        n_tensors = self._count("<Q", "tensors", 24)
        n_pairs = self._count("<Q", "metadata entries", 13)
        metadata: dict[str, Any] = {}
        for index in range(n_pairs):
            self._where = f"metadata entry {index}"
            key = self._string()
            self._where = f"metadata key {key}"
            metadata[key] = self._value(self._scalar("<I"))
        end = self._at
        tensors = tuple(self._tensor(index) for index in range(n_tensors))
        names = Counter(tensor.name for tensor in tensors)
        doubled = [name for name, count in names.items() if count > 1]
        if doubled:
            raise self._damaged(f"has two tensors {doubled[0]}")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"has general.alignment {alignment!r}, which is no power of two")
        return metadata, tensors, -(-self._at // alignment) * alignment, end

    def _tensor(self, index: int) -> TensorInfo:
        self._where = f"tensor {index}"
        name = self._string()
        self._where = f"tensor {name}"
        n_dims = self._scalar("<I")
        if not 1 <= n_dims <= 4:
            raise self._damaged(f"has {n_dims} dimensions")
        shape = tuple(reversed([self._scalar("<Q") for _ in range(n_dims)]))
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        if kind not in GGML_QUANT_SIZES:
            raise self._damaged(f"has type {kind}, which is unknown")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[-1] % block or prod(shape) == 0:
            raise self._damaged(f"has shape {shape}, which does not go into blocks of {block}")
        return TensorInfo(name, shape, GGMLQuantizationType(kind).name, offset, prod(shape) // block * block_bytes)

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise self._damaged(f"has value type {kind}, which is unknown")
        inner = self._scalar("<I")
        if inner == STRING:
            length = self._count("<Q", "strings", 8)
            if length <= LONG_ARRAY:
                return [self._string() for _ in range(length)]
            for _ in range(length):
                self._skip(self._scalar("<Q"))
            return length
        if inner not in SCALARS:
            raise self._damaged(f"is an array of value type {inner}, which is unknown")
        width = struct.calcsize(SCALARS[inner])
        length = self._count("<Q", "values", width)
        if length <= LONG_ARRAY:
            return [self._scalar(SCALARS[inner]) for _ in range(length)]
        self._skip(length * width)
        return length

    def _count(self, form: str, what: str, least: int) -> int:
        """A number of things that take at least ``least`` bytes each."""
        count = int(self._scalar(form))
        if count * least > len(self._data) - self._at:
            raise self._damaged(f"announces {count} {what}, more than the file can hold")
        return count

    def _string(self) -> str:
        length = self._scalar("<Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _scalar(self, form: str) -> Any:
        start = self._at
        self._skip(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)[0]

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise self._damaged("goes beyond the end of the file")
        self._at += length

    def _damaged(self, what: str) -> Failed:
        return Failed(f"{self._path} is a damaged GGUF file: {self._where} {what}")


def _describe(
    path: Path, size: int, metadata: dict[str, Any], tensors: tuple[TensorInfo, ...], parts: tuple[Path, ...]
) -> GgufInfo:
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise Failed(f"{path} has no general.architecture: it holds no model")

    def number(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        if not isinstance(value, int):
            raise Failed(f"{path} has no usable {arch}.{key}: {value!r}")
        return value

    n_layers, hidden = number("block_count"), number("embedding_length")
    if not 0 < n_layers <= len(tensors):
        raise Failed(f"{path} announces {n_layers} layers in {len(tensors)} tensors")

    def per_layer(key: str, default: Any = None) -> list[int]:
        value = metadata.get(f"{arch}.{key}", default)
        values = value if isinstance(value, list) else [value] * n_layers
        if len(values) != n_layers or not all(isinstance(entry, int) for entry in values):
            raise Failed(f"{path}: {arch}.{key} does not hold one number for each of {n_layers} layers")
        return values

    heads = per_layer("attention.head_count")
    widths = zip(
        per_layer("feed_forward_length"),
        heads,
        per_layer("attention.head_count_kv", metadata.get(f"{arch}.attention.head_count")),
        strict=True,
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding = by_name.get("token_embd.weight")
    if embedding is None:
        raise Failed(f"{path} has no tensor token_embd.weight: it holds no whole model")
    quants = {entry.value: entry.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() for entry in LlamaFileType}
    return GgufInfo(
        path=path,
        architecture=arch,
        name=metadata.get("general.name"),
        quant=quants.get(metadata.get("general.file_type", -1), "mixed"),
        file_bytes=size,
        parameters=sum(prod(tensor.shape) for tensor in tensors if tensor.name != "rope_freqs.weight"),
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        head_dim=number("attention.key_length", hidden // max(heads[0], 1)),
        context_length=number("context_length"),
        layers=tuple(LayerWidths(*width) for width in widths),
        tied="output.weight" not in by_name,
        tensors=tensors,
        metadata=metadata,
        parts=parts,
    )
