"""What a file will be before it is written: the type of every tensor, the bytes, and where rows fit no block.

llama.cpp itself is asked, in a dry run on the file's header, so that its mixes (more bits for some layers' value and
down projections, for the output, for embeddings) need not be copied here.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from cusprun.errors import Failed
from cusprun.exporters.gguf_quantize import try_types
from cusprun.exporters.gguf_source import GgufSource, padded
from cusprun.quants import TYPES, auto_type
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.gguf_header import GgufInfo

SUPER_BLOCK = 256  # row length that K-quants need
BLOCK = 32  # row length that the other quantized types need


@dataclass(frozen=True)
class Fallback:
    """A matrix that gets another type than was meant for it: its rows do not divide into that one's blocks."""

    tensor: str
    columns: int
    wanted: str
    got: str


@dataclass(frozen=True)
class Prediction:
    """What a file will be."""

    quant: str
    arch: str
    bytes: int
    types: Mapping[str, str] = field(repr=False)  # tensor -> type
    matrices: int
    fallbacks: tuple[Fallback, ...] = field(repr=False)

    @property
    def type_counts(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(Counter(self.types.values()).most_common())

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge export --dry-run --json` prints."""
        return {
            "quant": self.quant,
            "arch": self.arch,
            "bytes": self.bytes,
            "types": self.type_counts,
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks],
        }

    def as_lines(self) -> list[str]:
        """What `cusprun-edge export --dry-run` prints."""
        counts = ", ".join(f"{kind.lower()} ({count})" for kind, count in self.type_counts.items())
        size = f"{self.bytes} bytes ({self.bytes / 2**20:.1f} MiB)"
        return [f"{self.quant}  {size}  {self.arch}", f"tensors: {counts}", *self.fallback_lines()]

    def fallback_lines(self) -> list[str]:
        """How many matrices fall back, and a line for each length of row that does not divide; or nothing."""
        if not self.fallbacks:
            return []
        lines = [f"{len(self.fallbacks)} of {self.matrices} matrices fall back to another type:"]
        changes = Counter((fall.columns, BLOCK if fall.columns % BLOCK else SUPER_BLOCK) for fall in self.fallbacks)
        for columns, block in changes:
            kinds = Counter(
                f"{fall.wanted.lower()} -> {fall.got.lower()}" for fall in self.fallbacks if fall.columns == columns
            )
            told = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
            lines.append(f"  {columns} columns do not divide by {block}: {told}")
        return lines

    def check(self, written: GgufInfo) -> None:
        """Raises Failed where a file is not what was predicted."""
        types = {tensor.name: tensor.type for tensor in written.tensors}
        for name in sorted(types.keys() | self.types.keys()):
            if types.get(name) != self.types.get(name):
                raise Failed(
                    f"{written.path}: tensor {name} is {types.get(name)} and was predicted as {self.types.get(name)}"
                )
        if written.file_bytes != self.bytes:
            raise Failed(f"{written.path} has {written.file_bytes} bytes and {self.bytes} were predicted")


def predict_gguf(
    source: GgufSource, quant: str, overrides: Sequence[tuple[str, str]] = (), *, weighed: bool = False
) -> Prediction:
    """What ``source`` becomes as ``quant`` with ``overrides``, pairs of a regular expression and a type.

    Nothing stays on disk. Raises Failed with llama.cpp's reason where it refuses the model.
    """
    shapes = {plan.name: plan.shape for plan in source.tensors("F32")}
    matrices = source.matrices()
    kind = file_type(quant, matrices)
    with tempfile.TemporaryDirectory(prefix="cusprun-export-") as folder:
        hollow = Path(folder) / "hollow.gguf"
        header = source.write_header(hollow, kind, hole=not TYPES[quant].plain)
        if TYPES[quant].plain:
            types = {plan.name: plan.type for plan in source.tensors(quant.upper())}
            fallbacks: list[Fallback] = []
        else:
            given, narrow = tensor_types(matrices, quant, overrides)
            found = run_in_child(try_types, str(hollow), int(kind), weighed, given)
            types, told = found["types"], found["fallbacks"]
            fallbacks = [*narrow, *(Fallback(*row) for row in told)]
            fallbacks += _silent(matrices, types, quant, {*given, *(row[0] for row in told)})
    if missing := shapes.keys() - types.keys():
        raise Failed(f"llama.cpp's dry run does not tell the type of {min(missing)}: is llama-cpp-python too old?")
    return Prediction(
        quant=quant,
        arch=source.arch,
        bytes=header + sum(padded(tensor_bytes(shape, types[name])) for name, shape in shapes.items()),
        types={name: types[name] for name in shapes},
        matrices=len(matrices),
        fallbacks=tuple(fallbacks),
    )


def file_type(quant: str, matrices: Mapping[str, tuple[int, ...]]) -> LlamaFileType:
    """llama.cpp's number for general.file_type: of ``auto`` the type that most weights of the layers have."""
    if quant != "auto":
        return LlamaFileType[TYPES[quant].file_type]
    weights: Counter[str] = Counter()
    for name, shape in matrices.items():
        weights[auto_type(name, shape[-1])] += prod(shape)
    wide = weights["q4_k"] >= weights["iq4_nl"]
    return LlamaFileType[TYPES["auto"].file_type] if wide else LlamaFileType.MOSTLY_IQ4_NL


def tensor_types(
    matrices: Mapping[str, tuple[int, ...]], quant: str, overrides: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], list[Fallback]]:
    """Types that the quantizer is told, by matrix, and the fallbacks among them.

    The first of ``overrides`` that is found in a name counts. Rows that no block divides get F16: llama.cpp does so
    for some types and refuses others.
    """
    types, narrow = {}, []
    for name, shape in matrices.items():
        wish = next((kind for pattern, kind in overrides if re.search(pattern, name)), None)
        if wish is None and quant == "auto":
            wish = auto_type(name, shape[-1])
        if wish is not None:
            types[name] = wish
        if shape[-1] % BLOCK and wish not in ("f32", "f16", "bf16"):
            types[name] = "f16"
            narrow.append(Fallback(name, shape[-1], (wish or quant).upper(), "F16"))
    return types, narrow


def _silent(
    matrices: Mapping[str, tuple[int, ...]], types: Mapping[str, str], quant: str, known: set[str]
) -> list[Fallback]:
    """The output matrix where llama.cpp takes Q8_0 for a K-quant and says nothing of it."""
    output = "output.weight" if "output.weight" in matrices else "token_embd.weight"
    columns = matrices[output][-1]
    if output in known or quant == "q8_0" or columns % SUPER_BLOCK == 0 or types.get(output) != "Q8_0":
        return []
    return [Fallback(output, columns, "Q5_K" if quant == "iq2_m" else "Q6_K", "Q8_0")]


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor's data, rows first, in a type of :mod:`gguf`."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // block * size
