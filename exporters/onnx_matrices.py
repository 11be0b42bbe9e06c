"""The matrices of an ONNX model in their types: read when they are written, one at a time.

A matrix is (outputs, inputs) as in a model folder; each class here says how its type stores and multiplies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from cusprun.checkpoint import Weights
from cusprun.errors import Failed
from cusprun.exporters.compensation import Compensated
from cusprun.exporters.grids import join_rows
from cusprun.exporters.onnx_ops import MICROSOFT, Operators

ACCURACY_INT8 = 4  # MatMulNBits multiplies in int8; without it the same product takes ten times as long on a CPU
EMBEDDING_BLOCK = 32


@dataclass(frozen=True)
class Matrix:
    """One linear map: the tensors of the model folder that lie below one another in it, and their biases."""

    name: str
    parts: tuple[str, ...]
    outputs: int
    inputs: int
    biases: tuple[str, ...] = ()  # empty, or one for each part


class Multiplies(Protocol):
    """A type of matrices."""

    def linear(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        """Adds ``inputs`` (…, inputs) times the matrix plus its bias -> (…, outputs)."""
        ...

    def embed(self, graph: Operators, ids: ir.Value, matrix: Matrix) -> ir.Value:
        """Adds the look-up of rows, (…) -> (…, inputs)."""
        ...

    def output(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        """Adds the product with the output layer; where it is the embedding too, its rows are stored once."""
        ...


class Source:
    """Tensors of a model folder as lazy tensors of a graph."""

    def __init__(self, weights: Weights, element: np.dtype) -> None:
        self.weights, self.element = weights, element

    def rows(self, matrix: Matrix) -> np.ndarray:
        """The matrix in float32, (outputs, inputs)."""
        return np.concatenate([self.weights[part].float().numpy() for part in matrix.parts])

    def vector(self, graph: Operators, name: str, parts: Sequence[str], offset: float = 0.0) -> ir.Value:
        """An initializer of one-dimensional tensors plus ``offset``, one after the other, in the graph's type."""
        length = sum(self.weights.shape(part)[0] for part in parts)
        return self.lazy(graph, name, (length,), self.element, lambda: self._joined(parts, offset))

    def _joined(self, parts: Sequence[str], offset: float) -> np.ndarray:
        return np.concatenate([self.cast(self.weights[part].float().numpy() + offset, part) for part in parts])

    def cast(self, values: np.ndarray, name: str) -> np.ndarray:
        """``values`` in the graph's element type. Raises Failed where they are beyond it."""
        with np.errstate(over="ignore"):
            found = values.astype(self.element)
        if not np.isfinite(found).all():
            raise Failed(f"tensor {name} holds values beyond {self.element}: export it as fp32")
        return found

    def lazy(
        self, graph: Operators, name: str, shape: tuple[int, ...], element: np.dtype, make: Callable[[], np.ndarray]
    ) -> ir.Value:
        """An initializer that ``make`` gives when it is written."""

        def tensor() -> ir.Tensor:
            found = np.ascontiguousarray(make())
            if found.shape != shape or found.dtype != element:
                raise ValueError(f"{name} is {found.dtype} {found.shape}, not {element} {shape}")
            return ir.Tensor(found, name=name)

        kind = ir.DataType.from_numpy(np.dtype(element))
        return graph.initializer(ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(shape), name=name))


class Float:
    """Matrices in the graph's own element type."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def linear(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        shape = (matrix.inputs, matrix.outputs)
        weight = self.source.lazy(
            graph, f"{matrix.name}.weight", shape, self.source.element, lambda: self._cast(matrix).T
        )
        found = graph.MatMul(inputs, weight)
        if matrix.biases:
            found = graph.Add(found, self.source.vector(graph, f"{matrix.name}.bias", matrix.biases))
        return found

    def embed(self, graph: Operators, ids: ir.Value, matrix: Matrix) -> ir.Value:
        return graph.Gather(self._table(graph, matrix), ids)

    def output(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        return graph.FusedMatMul(inputs, self._table(graph, matrix), transB=1, _domain=MICROSOFT)

    def _table(self, graph: Operators, matrix: Matrix) -> ir.Value:
        return graph.known(f"{matrix.name}.weight") or self.source.lazy(
            graph,
            f"{matrix.name}.weight",
            (matrix.outputs, matrix.inputs),
            self.source.element,
            lambda: self._cast(matrix),
        )

    def _cast(self, matrix: Matrix) -> np.ndarray:
        return self.source.cast(self.source.rows(matrix), matrix.parts[0])


class Blocks:
    """Matrices in blocks of ``block`` weights along their inputs that share a scale (MatMulNBits).

    Symmetric: a weight is its scale times an integer from -2^(bits-1) to 2^(bits-1) - 1. With ``k_quant`` each block
    has a zero point of its own and both are fitted to the block. Matrices of ``compensated`` are taken as they are.
    """

    def __init__(
        self,
        source: Source,
        bits: int,
        block: int,
        *,
        k_quant: bool = False,
        output_bits: int = 8,
    ) -> None:
        self.source, self.bits, self.block = source, bits, block
        self.compensated: Compensated | None = None
        self.k_quant, self.output_bits = k_quant, output_bits

    def linear(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        packed = self._packed(graph, matrix, self.bits, self.block, k_quant=self.k_quant)
        bias = self.source.vector(graph, f"{matrix.name}.bias", matrix.biases) if matrix.biases else None
        return _nbits(graph, inputs, matrix, packed, self.bits, self.block, bias)

    def embed(self, graph: Operators, ids: ir.Value, matrix: Matrix) -> ir.Value:
        rows, scales, _ = self._packed(graph, matrix, self.output_bits, EMBEDDING_BLOCK)
        flat = graph.Reshape(rows, graph.constant(f"{matrix.name}.rows", np.array([matrix.outputs, -1])))
        settings = {"bits": self.output_bits, "block_size": EMBEDDING_BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return graph.GatherBlockQuantized(flat, ids, scales, _domain=MICROSOFT, **settings)

    def output(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        packed = self._packed(graph, matrix, self.output_bits, EMBEDDING_BLOCK)
        return _nbits(graph, inputs, matrix, packed, self.output_bits, EMBEDDING_BLOCK)

    def _packed(
        self, graph: Operators, matrix: Matrix, bits: int, block: int, *, k_quant: bool = False
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Initializers of the integers, the scales and, with ``k_quant``, the zero points."""
        names = [f"{matrix.name}.{part}" for part in ("weight", "scales", "zero_points")]
        if (rows := graph.known(names[0])) is not None:
            scales = graph.known(names[1])
            assert scales is not None
            return rows, scales, graph.known(names[2])
        blocks = math.ceil(matrix.inputs / block)
        quantize = quantize_k if k_quant else quantize_symmetric

        def part(index: int) -> np.ndarray:
            if self.compensated is not None and all(tensor in self.compensated for tensor in matrix.parts):
                found = join_rows([self.compensated[tensor] for tensor in matrix.parts])
                return (pack(found.codes.numpy().reshape(*shape, block), bits), found.scales.numpy())[index]
            return quantize(self.source.rows(matrix), bits, block)[index]

        byte, shape = np.dtype(np.uint8), (matrix.outputs, blocks)
        lazy = self.source.lazy
        rows = lazy(graph, names[0], (*shape, block * bits // 8), byte, lambda: part(0))
        scales = lazy(graph, names[1], shape, np.dtype(np.float32), lambda: part(1))
        if not k_quant:
            return rows, scales, None
        return (
            rows,
            scales,
            lazy(graph, names[2], (matrix.outputs, math.ceil(blocks * bits / 8)), byte, lambda: part(2)),
        )


class Dynamic:
    """Matrices in int8 with a scale for each output; inputs are quantized as they come, with a scale for each token.

    The operator has one scale for all tokens of a call, and one token with massive activations then leaves the others
    no digits (SmolLM2: KL divergence 0.71 nats instead of 0.04); each token is divided by its own largest input before
    and multiplied after. Embedding and output layer are blocks of eight bits, so that tied ones are stored once.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._table = Blocks(source, 8, EMBEDDING_BLOCK, output_bits=8)
        self._levelled: tuple[ir.Value, ir.Value, ir.Value] | None = None  # inputs, over their peaks, the peaks

    def linear(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        def part(index: int) -> np.ndarray:
            return quantize_channels(self.source.rows(matrix))[index]

        lazy = self.source.lazy
        shape = (matrix.inputs, matrix.outputs)
        weight = lazy(graph, f"{matrix.name}.weight", shape, np.dtype(np.int8), lambda: part(0).T)
        scale = lazy(graph, f"{matrix.name}.scale", (matrix.outputs,), np.dtype(np.float32), lambda: part(1))
        if self._levelled is None or self._levelled[0] is not inputs:  # gate and up read the same
            peaks = graph.Max(
                graph.ReduceMax(graph.Abs(inputs), graph.constant("last_axis", np.array([-1])), keepdims=1),
                graph.constant("tiny", np.float32(1e-30)),
            )
            self._levelled = (inputs, graph.Div(inputs, peaks), peaks)
        _, levelled, peaks = self._levelled
        found = graph.Mul(graph.DynamicQuantizeMatMul(levelled, weight, scale, _domain=MICROSOFT), peaks)
        if matrix.biases:
            found = graph.Add(found, self.source.vector(graph, f"{matrix.name}.bias", matrix.biases))
        return found

    def embed(self, graph: Operators, ids: ir.Value, matrix: Matrix) -> ir.Value:
        return self._table.embed(graph, ids, matrix)

    def output(self, graph: Operators, inputs: ir.Value, matrix: Matrix) -> ir.Value:
        return self._table.output(graph, inputs, matrix)


def quantize_channels(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (outputs, inputs) and a scale for each output, float32 (outputs,): the largest weight becomes ±127."""
    scale = np.abs(rows).max(axis=1) / 127
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.rint(rows * inverse[:, None]).astype(np.int8), scale.astype(np.float32)


def quantize_symmetric(rows: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers packed as MatMulNBits reads them, (outputs, blocks, block * bits / 8) uint8, and scales.

    The weight of largest magnitude becomes -2^(bits-1) exactly, so that the whole range is used, as in llama.cpp's
    q4_0. Inputs are filled up with zeros to whole blocks.
    """
    cut = _in_blocks(rows, block)
    half = 1 << (bits - 1)
    peak = np.take_along_axis(cut, np.abs(cut).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    scales = (peak / -half).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    integers = np.clip(np.rint(cut * inverse[..., None]), -half, half - 1) + half
    return pack(integers.astype(np.uint8), bits), scales


def quantize_k(rows: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scales and zero points, fitted block by block as llama.cpp's K-quants are.

    The fit is onnxruntime's own; zero points are packed like the integers, (outputs, ceil(blocks * bits / 8)) uint8.
    """
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    cut = _in_blocks(rows, block)
    outputs, blocks = cut.shape[:2]
    integers, scales, zeros = quant_tensor_k_quant_cpu(cut.reshape(outputs, -1), bits, block)
    packed = pack(integers.reshape(outputs, blocks, block).astype(np.uint8), bits)
    zeros = zeros.reshape(outputs, blocks).astype(np.uint8)
    if bits == 4 and blocks % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return packed, scales.reshape(outputs, blocks).astype(np.float32), pack(zeros, bits)


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Neighbours along the last axis share a byte in four bits, the first in the lower half."""
    return integers if bits == 8 else integers[..., ::2] | integers[..., 1::2] << 4


def _in_blocks(rows: np.ndarray, block: int) -> np.ndarray:
    """(outputs, inputs) -> (outputs, blocks, block), zeros behind the last input."""
    outputs, inputs = rows.shape
    return np.pad(rows, ((0, 0), (0, -inputs % block))).reshape(outputs, -1, block)


def _nbits(
    graph: Operators,
    inputs: ir.Value,
    matrix: Matrix,
    packed: tuple[ir.Value, ir.Value, ir.Value | None],
    bits: int,
    block: int,
    bias: ir.Value | None = None,
) -> ir.Value:
    tail = [None, bias] if bias is not None else []
    operands = [*packed[:2], packed[2], *tail] if packed[2] is not None or tail else [*packed[:2]]
    return graph.MatMulNBits(
        inputs, *operands, K=matrix.inputs, N=matrix.outputs, bits=bits, block_size=block,
        accuracy_level=ACCURACY_INT8, _domain=MICROSOFT,
    )  # fmt: skip
