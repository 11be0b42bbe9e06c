"""The types that an ONNX model is written in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnnxType:
    """How an ONNX model holds its matrices and what it computes in."""

    bits: float  # of a weight, block scales included
    compute: str  # element type of what flows between the operators, and of the cache: float32 or float16
    weight: str  # float, dynamic (int8 per output channel, inputs quantized as they come) or blocks (MatMulNBits)


TYPES: dict[str, OnnxType] = {
    "fp32": OnnxType(32, "float32", "float"),
    "fp16": OnnxType(16, "float16", "float"),
    "int8": OnnxType(8.1, "float32", "dynamic"),
    "int4": OnnxType(5, "float32", "blocks"),
}
NAMES = " ".join(TYPES)
BLOCK_SIZES = (32, 128)  # weights that share a scale in int4
OUTPUT_BITS = (4, 8)  # of the output layer in int4; tied embeddings are the same matrix
