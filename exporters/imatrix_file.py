"""The file of an importance matrix, llama.cpp's own: a GGUF of type ``imatrix`` with Σ x² and the count of tokens for
each matrix. Nothing here imports torch: the quantizer's process reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from cusprun.errors import InvalidRequest
from cusprun.files import written_whole

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """Σ x² over ``tokens`` tokens by input column, (columns,) float64, for each matrix by its name in a .gguf."""

    sums: Mapping[str, np.ndarray]
    tokens: int
    window: int

    def means(self) -> dict[str, np.ndarray]:
        """E[x²] by column, (columns,) float32."""
        return {name: (values / self.tokens).astype(np.float32) for name, values in self.sums.items()}


def write_imatrix(path: Path, found: Imatrix, texts: Sequence[str]) -> None:
    """Writes llama.cpp's file, whole or not at all; ``texts`` names what it was taken of."""
    with written_whole(path) as part:
        writer = gguf.GGUFWriter(part, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(texts))
        writer.add_uint32("imatrix.chunk_count", found.tokens // found.window)
        writer.add_uint32("imatrix.chunk_size", found.window)
        for name, values in found.sums.items():
            writer.add_tensor(name + SUMS, values.astype(np.float32).reshape(1, -1))
            writer.add_tensor(name + COUNTS, np.full((1, 1), found.tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """E[x²] by column, (columns,) float32, by matrix, from a file of llama.cpp's or ours.

    Raises InvalidRequest where it is no importance matrix.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InvalidRequest(f"{path} is no importance matrix in GGUF form: {error}") from error
    tensors = {tensor.name: np.asarray(tensor.data, dtype=np.float32).reshape(-1) for tensor in reader.tensors}
    found = {}
    for name in (name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)):
        sums, counts = tensors[name + SUMS], tensors.get(name + COUNTS)
        if counts is None or counts.size != 1 or not float(counts[0]) > 0 or not np.isfinite(sums).all():
            raise InvalidRequest(f"{path}: {name} has no count of tokens, or sums that are no numbers")
        found[name] = sums / float(counts[0])
    if not found:
        raise InvalidRequest(f"{path} holds no importance matrix: it needs tensors called *{SUMS}")
    return found
