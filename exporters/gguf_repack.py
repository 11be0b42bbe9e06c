"""Which matrices of a GGUF llama.cpp lays out anew at load, in rows side by side, for the wide instructions of a CPU.

Those are multiplied faster there, prompts above all. Which types and how many rows they need is in llama.cpp's
``ggml/src/ggml-cpu/repack.cpp``, ``ggml_repack_get_optimal_repack_type``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cusprun.runtimes.gguf_header import GgufInfo, TensorInfo

Cpu = Literal["arm", "avx2"]

# Rows (output features) must be a multiple of this. arm: NEON with dot products, so from ARMv8.2 on.
ROWS: dict[Cpu, dict[str, int]] = {
    "arm": {"Q4_0": 4, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8},
    "avx2": {"Q4_0": 8, "IQ4_NL": 8, "MXFP4": 8, "Q4_K": 8},
}
EMBEDDING = "token_embd.weight"
VOCABULARY = (EMBEDDING, "output.weight")  # what has a row for each token


@dataclass(frozen=True)
class Repacked:
    """How much of a file's matrices is laid out anew, in bytes; an embedding that is not tied is no such matrix."""

    bytes: int
    of: int
    left: tuple[TensorInfo, ...]  # matrices that stay as they are

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.bytes / self.of if self.of else 0.0


def repacked(info: GgufInfo, cpu: Cpu = "arm") -> Repacked:
    """What of the file is laid out anew on a CPU of that kind."""
    matrices = [t for t in info.tensors if len(t.shape) == 2 and (info.tied or t.name != EMBEDDING)]
    left = tuple(t for t in matrices if t.type not in ROWS[cpu] or t.shape[0] % ROWS[cpu][t.type])
    whole = sum(t.bytes for t in matrices)
    return Repacked(whole - sum(t.bytes for t in left), whole, left)
