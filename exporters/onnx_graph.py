"""One decoder graph for prompt and decoding, of the operators that onnxruntime runs fast on CPU and CUDA.

Inputs: input_ids (batch, sequence), attention_mask (batch, past + sequence), past_key_values.N.key and .value, each
(batch, kv heads of that layer, past, head_dim), N counting the layers that have attention. Outputs: logits (batch,
rows, vocabulary) and present.N.key and .value. The names and meanings are onnxruntime-genai's; sequences of a batch are
filled up on the right. logits_to_keep, which may be left out, is the number of last positions that logits are computed
for; 0, the default, is all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cusprun.anatomy import Anatomy
from cusprun.exporters.onnx_matrices import Matrix, Multiplies, Source
from cusprun.exporters.onnx_ops import MICROSOFT, Operators

OPSET = 21
IR_VERSION = 10
LOGITS_TO_KEEP = "logits_to_keep"


@dataclass(frozen=True)
class Decoder:
    """What the graph needs to know of a model beside its anatomy; arrays float32."""

    anatomy: Anatomy
    epsilon: float  # of the RMS norms
    cosines: np.ndarray  # (context, head_dim / 2), of the rotary embedding
    sines: np.ndarray
    sliding_window: int | None


def build_model(decoder: Decoder, source: Source, multiplies: Multiplies) -> ir.Model:
    """The model whose initializers read the weights when they are written; nothing is read here."""
    return _Graph(decoder, source, multiplies).model()


class _Graph:
    def __init__(self, decoder: Decoder, source: Source, multiplies: Multiplies) -> None:
        self.decoder, self.anatomy = decoder, decoder.anatomy
        self.source, self.multiplies = source, multiplies
        self.tape = Operators()
        self.kind = ir.DataType.from_numpy(source.element)
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.defaults: list[ir.Value] = []  # inputs that may be left out

    def model(self) -> ir.Model:
        ids = self._input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        mask = self._input("attention_mask", ir.DataType.INT64, ("batch", "total"))
        logits = self._decode(ids, *self._lengths(mask))
        logits.name = "logits"
        logits.shape = ir.Shape(("batch", "rows", self.anatomy.vocab_size))
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            inputs=self.inputs,
            outputs=[logits, *self.outputs],
            nodes=self.tape.nodes,
            initializers=[*self.tape.initializers, *self.defaults],
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="cusprun")

    def _decode(self, ids: ir.Value, lengths: ir.Value, total: ir.Value) -> ir.Value:
        """Token ids -> logits, through all layers."""
        tape, family = self.tape, self.anatomy.family
        table = self._table("embedding", family.embedding)
        stream = self.multiplies.embed(tape, ids, table)
        normed: ir.Value | None = None
        change: ir.Value | None = None  # what the block before added, not yet in the stream
        attention_layers = 0
        for index, widths in enumerate(self.anatomy.layers):
            if widths.heads:
                stream, normed = self._norm(stream, change, f"layers.{index}.input_norm", self._of(index, "input"))
                change = self._attention(index, attention_layers, normed, lengths, total)
                attention_layers += 1
            stream, normed = self._norm(stream, change, f"layers.{index}.ffn_norm", self._of(index, "post_attention"))
            change = self._ffn(index, normed)
        _, normed = self._norm(stream, change, "final_norm", family.final_norm)
        rows = tape.Slice(normed, *self._last_rows())
        output = table if self.anatomy.tied else self._table("output", family.output)
        logits = self.multiplies.output(tape, rows, output)
        return tape.Cast(logits, to=ir.DataType.FLOAT) if self.kind != ir.DataType.FLOAT else logits

    def _attention(self, index: int, place: int, inputs: ir.Value, lengths: ir.Value, total: ir.Value) -> ir.Value:
        """Attention of one layer, its cache under number ``place``; (batch, sequence, hidden) -> the same."""
        widths, head_dim = self.anatomy.layers[index], self.anatomy.head_dim
        biased = self.anatomy.attention_bias
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        rows = (widths.heads + 2 * widths.kv_heads) * head_dim
        packed = self._linear(index, "qkv", names, rows, self.anatomy.hidden_size, biased, inputs)
        shape = ("batch", widths.kv_heads, "past", head_dim)
        past = [self._input(f"past_key_values.{place}.{part}", self.kind, shape) for part in ("key", "value")]
        window = self.decoder.sliding_window
        found, *present = self.tape.GroupQueryAttention(
            packed, None, None, *past, lengths, total, *self._rotary(),
            num_heads=widths.heads, kv_num_heads=widths.kv_heads, do_rotary=1, scale=head_dim**-0.5,
            local_window_size=-1 if window is None else window, _domain=MICROSOFT, _outputs=3,
        )  # fmt: skip
        for value, part in zip(present, ("key", "value"), strict=True):
            value.name = f"present.{place}.{part}"
            value.shape = ir.Shape(("batch", widths.kv_heads, "total", head_dim))
            value.type = ir.TensorType(self.kind)
            self.outputs.append(value)
        return self._linear(
            index, "o", ["self_attn.o_proj"], self.anatomy.hidden_size, widths.heads * head_dim, biased, found
        )

    def _ffn(self, index: int, inputs: ir.Value) -> ir.Value:
        """(batch, sequence, hidden) -> the same: down(silu(gate) * up)."""
        ffn, hidden, biased = self.anatomy.layers[index].ffn, self.anatomy.hidden_size, self.anatomy.mlp_bias
        gate, up = (
            self._linear(index, name, [f"mlp.{name}_proj"], ffn, hidden, biased, inputs) for name in ("gate", "up")
        )
        active = self.tape.Mul(self.tape.Mul(gate, self.tape.Sigmoid(gate)), up)
        return self._linear(index, "down", ["mlp.down_proj"], hidden, ffn, biased, active)

    def _linear(
        self, index: int, name: str, parts: Sequence[str], outputs: int, inputs: int, biased: bool, value: ir.Value
    ) -> ir.Value:
        prefix = self.anatomy.prefix(index)
        matrix = Matrix(
            f"layers.{index}.{name}",
            tuple(f"{prefix}{part}.weight" for part in parts),
            outputs,
            inputs,
            tuple(f"{prefix}{part}.bias" for part in parts) if biased else (),
        )
        return self.multiplies.linear(self.tape, value, matrix)

    def _norm(self, stream: ir.Value, change: ir.Value | None, name: str, weight: str) -> tuple[ir.Value, ir.Value]:
        """The stream with ``change`` added, and its RMS norm."""
        scale = self.source.vector(self.tape, f"{name}.weight", [weight])
        epsilon = self.decoder.epsilon
        if change is not None:
            normed, _, _, added = self.tape.SkipSimplifiedLayerNormalization(
                stream, change, scale, epsilon=epsilon, _domain=MICROSOFT, _outputs=4
            )
            return added, normed
        return stream, self._first_norm(stream, scale, epsilon)

    def _first_norm(self, stream: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
        """In single steps, which onnxruntime joins into one: the standard has the operator from opset 23 on only."""
        tape = self.tape
        wide = stream if self.kind == ir.DataType.FLOAT else tape.Cast(stream, to=ir.DataType.FLOAT)
        two = self.tape.constant("two", np.float32(2))
        square = tape.ReduceMean(tape.Pow(wide, two), self.tape.constant("last_axis", np.array([-1])), keepdims=1)
        root = tape.Sqrt(tape.Add(square, self.tape.constant("epsilon", np.float32(epsilon))))
        normed = tape.Div(wide, root)
        if self.kind != ir.DataType.FLOAT:
            normed = tape.Cast(normed, to=self.kind)
        return tape.Mul(normed, scale)

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """From the mask: each sequence's tokens less one, int32 (batch,), and the longest's, an int32 scalar."""
        tape = self.tape
        counts = tape.ReduceSum(mask, self.tape.constant("mask_axis", np.array([1])), keepdims=0)
        lengths = tape.Cast(tape.Sub(counts, self.tape.constant("one", np.array(1))), to=ir.DataType.INT32)
        longest = tape.Gather(tape.Shape(mask), self.tape.constant("total_axis", np.array(1)))
        return lengths, tape.Cast(longest, to=ir.DataType.INT32)

    def _last_rows(self) -> tuple[ir.Value, ...]:
        """Starts, ends and axes of the positions that logits are computed for."""
        keep = self._input(LOGITS_TO_KEEP, ir.DataType.INT64, (1,))
        keep.const_value = ir.tensor(np.zeros(1, dtype=np.int64), name=LOGITS_TO_KEEP)
        self.defaults.append(keep)
        end = self.tape.constant("end", np.array([np.iinfo(np.int64).max]))
        return self.tape.Neg(keep), end, self.tape.constant("rows_axis", np.array([1]))

    def _rotary(self) -> Iterator[ir.Value]:
        for name, table in (("cosines", self.decoder.cosines), ("sines", self.decoder.sines)):
            yield self.tape.constant(name, table.astype(self.source.element))

    def _table(self, name: str, tensor: str) -> Matrix:
        return Matrix(name, (tensor,), self.anatomy.vocab_size, self.anatomy.hidden_size)

    def _of(self, index: int, norm: str) -> str:
        return f"{self.anatomy.prefix(index)}{norm}_layernorm.weight"

    def _input(self, name: str, kind: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        self.inputs.append(value)
        return value
