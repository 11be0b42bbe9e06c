"""A model folder that was checked and can be written as a .gguf in any plain type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import gguf
import numpy as np

from cusprun.anatomy import Anatomy, describe, read_config
from cusprun.checkpoint import Weights
from cusprun.errors import InvalidRequest
from cusprun.exporters import gguf_metadata, gguf_tensors, gguf_tokenizer
from cusprun.exporters.compensation import Compensated
from cusprun.exporters.gguf_config import check_layers, read_number
from cusprun.exporters.grids import gguf_blocks, join_rows
from cusprun.progress import say

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Rounding:
    """Matrices that are rounded already, and the types of all tensors by their names in the file."""

    compensated: Compensated
    types: Mapping[str, str]

    def plan(self, plan: gguf_tensors.TensorPlan) -> gguf_tensors.TensorPlan:
        """A tensor's plan, with its type of blocks where it is one of them."""
        held = plan.source is not None and plan.source in self.compensated
        return replace(plan, type=self.types[plan.name]) if held else plan

    def blocks(self, plan: gguf_tensors.TensorPlan) -> np.ndarray:
        """The data of one of them."""
        matrix = join_rows([self.compensated[source] for source in plan.sources])
        if plan.rotary_heads:
            matrix = matrix.change_rows(lambda rows: gguf_tensors.to_rotary_pairs(rows, plan.rotary_heads))
        return gguf_blocks(matrix, plan.type.lower())


def padded(count: int) -> int:
    """``count`` bytes with what is put behind them until the next tensor."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def check_gguf_source(folder: Path) -> None:
    """Raises InvalidRequest where llama.cpp has no form for the model of a folder: its positions, its tokenizer, its
    layers.
    """
    GgufSource(folder, folder.name, {}).tensors("F32")


class GgufSource:
    """What a file is made of: sizes, weights, tokenizer, and what the file is to say of itself.

    Raises InvalidRequest where the folder's parts are missing, damaged or do not belong together.
    """

    def __init__(self, folder: Path, name: str, metadata: gguf_metadata.Metadata) -> None:
        self.name, self.metadata = name, metadata
        check_layers(folder)
        self.config = read_config(folder)
        self.anatomy: Anatomy = describe(folder)
        self.weights = Weights(folder)
        self.weights.check(self.anatomy)
        if self.anatomy.head_dim % 2:
            raise InvalidRequest(f"{folder}: a head_dim of {self.anatomy.head_dim} cannot rotate in pairs")
        self.rope = gguf_tensors.read_rope(self.config, self.anatomy.head_dim)
        read_number(self.config, "rms_norm_eps", 1e-6)
        context = gguf_metadata.context_length(self.config)
        self.vocabulary = gguf_tokenizer.read_vocabulary(folder, self.anatomy.vocab_size, self.config)
        if context < read_number(self.config, "max_position_embeddings", context):
            say(f"{folder}: the context is cut to the sliding window of {context} tokens, which llama.cpp cannot slide")

    @property
    def arch(self) -> str:
        return gguf_metadata.architecture(self.anatomy)

    @property
    def matrix_type(self) -> str:
        """The plain type that loses nothing of the stored embedding's: F16, BF16 or F32."""
        stored = self.weights.dtype(self.anatomy.family.embedding)
        return stored if stored in ("F16", "BF16") else "F32"

    def tensors(self, matrix_type: str) -> list[gguf_tensors.TensorPlan]:
        """The tensors of the file in their order, matrices in ``matrix_type``."""
        return gguf_tensors.plan_tensors(self.anatomy, matrix_type, self.rope.freqs)

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Shape of every matrix, rows first, by its name in the file."""
        return {plan.name: plan.shape for plan in self.tensors("F32") if len(plan.shape) == 2}

    def write(
        self, path: Path, matrix_type: str, file_type: gguf.LlamaFileType, rounded: Rounding | None = None
    ) -> None:
        """Writes the file with matrices in ``matrix_type``, those of ``rounded`` as they are.

        At most one tensor is in memory.
        """
        plans = self.tensors(matrix_type)
        if rounded is not None:
            plans = [rounded.plan(plan) for plan in plans]
        writer = self._begin(path, plans, file_type)
        try:
            blocks = rounded.blocks if rounded is not None else None
            for data in gguf_tensors.read_tensors(self.weights, plans, self.rope.freqs, blocks):
                writer.write_tensor_data(data)
        finally:
            writer.close()

    def write_header(self, path: Path, file_type: gguf.LlamaFileType, *, hole: bool) -> int:
        """Writes a file of matrices in F16 without their data, or with a ``hole`` where they would be.

        Returns the bytes in front of the data, which are as many whatever the types.
        """
        plans = self.tensors("F16")
        self._begin(path, plans, file_type).close()
        header = padded(path.stat().st_size)
        if hole:
            with path.open("r+b") as file:
                file.truncate(header + sum(padded(plan.bytes) for plan in plans))
        return header

    def _begin(
        self, path: Path, plans: list[gguf_tensors.TensorPlan], file_type: gguf.LlamaFileType
    ) -> gguf.GGUFWriter:
        """A writer that has written everything in front of the tensors' data."""
        parameters = sum(prod(plan.shape) for plan in plans if plan.source is not None)
        writer = gguf.GGUFWriter(path, self.arch)
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
        except BaseException:
            writer.close()
            raise
        return writer
