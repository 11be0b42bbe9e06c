"""One decoder graph for prompt and decoding, of the operators that onnxruntime runs fast on CPU and CUDA.

Inputs: input_ids (batch, sequence), attention_mask (batch, past + sequence), past_key_values.N.key and .value, each
(batch, kv heads of that layer, past, head_dim), N counting the layers that have attention. Outputs: logits (batch,
rows, vocabulary) and present.N.key and .value. The names and meanings are onnxruntime-genai's; sequences of a batch are
filled up on the right. logits_to_keep, which may be left out, is the number of last positions that logits are computed
for; 0, the default, is all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cusprun.anatomy import Anatomy
from cusprun.exporters.onnx_matrices import Matrix, Multiplies, Source
from cusprun.exporters.onnx_ops import MICROSOFT, Operators

OPSET = 21
IR_VERSION = 10
LOGITS_TO_KEEP = "logits_to_keep"
INPUT_NORM = "input_layernorm"


Tables = tuple[np.ndarray, np.ndarray]  # cosines and sines, each (context, head_dim / 2) float32


@dataclass(frozen=True)
class Decoder:
    """What the graph needs to know of a model."""

    anatomy: Anatomy
    rotary: Mapping[float | None, Tables]  # by the base of layers that have one of their own; None for the others

    @property
    def positions(self) -> int:
        """Tokens that the graph can read in all."""
        return len(next(iter(self.rotary.values()))[0])


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
        for node in graph:
            for value in node.outputs:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""  # left out: what has a name is allocated and written
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="cusprun")

    def _decode(self, ids: ir.Value, lengths: ir.Value, total: ir.Value) -> ir.Value:
        """Token ids -> logits, through all layers."""
        tape, family = self.tape, self.anatomy.family
        table = self._table("embedding", family.embedding)
        stream = self.multiplies.embed(tape, ids, table)
        if family.scales_embedding:
            root = np.asarray(self.anatomy.hidden_size**0.5, dtype=self.source.element)
            stream = tape.Mul(stream, tape.constant("embedding_scale", root))
        normed: ir.Value | None = None
        change: ir.Value | None = None  # what the block before added, not yet in the stream
        place = 0  # layers with attention so far
        for index, widths in enumerate(self.anatomy.layers):
            if widths.heads:
                stream, normed = self._norm(stream, change, f"layers.{index}.input_norm", self._of(index, INPUT_NORM))
                change = self._attention(index, place, normed, lengths, total)
                change = self._behind(index, change, "attention_norm", family.attention_norm_behind)
                place += 1
            stream, normed = self._norm(stream, change, f"layers.{index}.ffn_norm", self._of(index, family.ffn_norm))
            change = self._behind(index, self._ffn(index, normed), "output_norm", family.ffn_norm_behind)
        _, normed = self._norm(stream, change, "final_norm", family.final_norm)
        rows = tape.Slice(normed, *self._last_rows())
        output = table if self.anatomy.tied else self._table("output", family.output)
        logits = self.multiplies.output(tape, rows, output)
        if self.kind != ir.DataType.FLOAT:
            logits = tape.Cast(logits, to=ir.DataType.FLOAT)
        if (cap := self.anatomy.output_softcap) is not None:
            limit = tape.constant("logit_cap", np.float32(cap))
            logits = tape.Mul(tape.Tanh(tape.Div(logits, limit)), limit)
        return logits

    def _attention(self, index: int, place: int, inputs: ir.Value, lengths: ir.Value, total: ir.Value) -> ir.Value:
        """Attention of one layer, its cache under number ``place``; (batch, sequence, hidden) -> the same."""
        anatomy, own = self.anatomy, self.anatomy.attention[index]
        widths, head_dim, biased = anatomy.layers[index], anatomy.head_dim, anatomy.attention_bias
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        rows = (widths.heads + 2 * widths.kv_heads) * head_dim
        packed = self._linear(index, "qkv", names, rows, anatomy.hidden_size, biased, inputs)
        shape = ("batch", widths.kv_heads, "past", head_dim)
        past = [self._input(f"past_key_values.{place}.{part}", self.kind, shape) for part in ("key", "value")]
        operands = [packed, None, None]
        if anatomy.family.qk_norms:
            operands = self._normed_heads(index, packed)
        rotary = self._rotary(own.theta) if own.rotates else ()
        found, *present = self.tape.GroupQueryAttention(
            *operands, *past, lengths, total, *rotary,
            num_heads=widths.heads, kv_num_heads=widths.kv_heads, do_rotary=int(own.rotates),
            scale=anatomy.attention_scale, softcap=anatomy.attention_softcap or 0.0,
            local_window_size=-1 if own.window is None else own.window, _domain=MICROSOFT, _outputs=3,
        )  # fmt: skip
        for value, part in zip(present, ("key", "value"), strict=True):
            value.name = f"present.{place}.{part}"
            value.shape = ir.Shape(("batch", widths.kv_heads, "total", head_dim))
            value.type = ir.TensorType(self.kind)
            self.outputs.append(value)
        return self._linear(
            index, "o", ["self_attn.o_proj"], anatomy.hidden_size, widths.heads * head_dim, biased, found
        )

    def _normed_heads(self, index: int, packed: ir.Value) -> list[ir.Value | None]:
        """q, k and v apart, each head of q and k normed over its own values."""
        tape, widths, head_dim = self.tape, self.anatomy.layers[index], self.anatomy.head_dim
        counts = [widths.heads, widths.kv_heads, widths.kv_heads]
        sizes = tape.constant(f"layers.{index}.heads", np.array([count * head_dim for count in counts]))
        parts = list(tape.Split(packed, sizes, axis=-1, _outputs=3))
        for number, name in enumerate("qk"):
            # (batch, sequence, heads * head_dim) -> (batch, sequence, heads, head_dim) and back: 0 keeps a dimension
            apart = tape.constant(f"heads_of_{counts[number]}", np.array([0, 0, counts[number], head_dim]))
            joined = tape.constant("joined_heads", np.array([0, 0, -1]))
            scale = self._norm_weight(f"layers.{index}.{name}_norm", self._of(index, f"self_attn.{name}_norm"))
            parts[number] = tape.Reshape(self._plain_norm(tape.Reshape(parts[number], apart), scale), joined)
        return parts

    def _ffn(self, index: int, inputs: ir.Value) -> ir.Value:
        """(batch, sequence, hidden) -> the same: down(act(gate) * up)."""
        ffn, hidden, biased = self.anatomy.layers[index].ffn, self.anatomy.hidden_size, self.anatomy.mlp_bias
        gate, up = (
            self._linear(index, name, [f"mlp.{name}_proj"], ffn, hidden, biased, inputs) for name in ("gate", "up")
        )
        if self.anatomy.family.activation == "silu":
            active = self.tape.Mul(gate, self.tape.Sigmoid(gate))
        else:
            active = self.tape.Gelu(gate, approximate="tanh")
        return self._linear(index, "down", ["mlp.down_proj"], hidden, ffn, biased, self.tape.Mul(active, up))

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
        scale = self._norm_weight(name, weight)
        if change is None:
            return stream, self._plain_norm(stream, scale)
        normed, _, _, added = self.tape.SkipSimplifiedLayerNormalization(
            stream, change, scale, epsilon=self.anatomy.norm_eps, _domain=MICROSOFT, _outputs=4
        )
        return added, normed

    def _behind(self, index: int, change: ir.Value, name: str, norm: str | None) -> ir.Value:
        """What a block adds, normed where the family norms it."""
        if norm is None:
            return change
        return self._plain_norm(change, self._norm_weight(f"layers.{index}.{name}", self._of(index, norm)))

    def _norm_weight(self, name: str, weight: str) -> ir.Value:
        return self.source.vector(self.tape, f"{name}.weight", [weight], self.anatomy.family.norm_offset)

    def _plain_norm(self, values: ir.Value, scale: ir.Value) -> ir.Value:
        """In single steps, which onnxruntime joins into one: the standard has the operator from opset 23 on only."""
        tape = self.tape
        wide = values if self.kind == ir.DataType.FLOAT else tape.Cast(values, to=ir.DataType.FLOAT)
        square = tape.Pow(wide, tape.constant("two", np.float32(2)))
        mean = tape.ReduceMean(square, tape.constant("last_axis", np.array([-1])), keepdims=1)
        normed = tape.Div(wide, tape.Sqrt(tape.Add(mean, tape.constant("epsilon", np.float32(self.anatomy.norm_eps)))))
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

    def _rotary(self, theta: float | None) -> Iterator[ir.Value]:
        own = "" if theta is None else f"_of_{theta:g}"
        for name, table in zip(("cosines", "sines"), self.decoder.rotary[theta], strict=True):
            yield self.tape.constant(name + own, table.astype(self.source.element))

    def _table(self, name: str, tensor: str) -> Matrix:
        return Matrix(name, (tensor,), self.anatomy.vocab_size, self.anatomy.hidden_size)

    def _of(self, index: int, norm: str) -> str:
        return f"{self.anatomy.prefix(index)}{norm}.weight"

    def _input(self, name: str, kind: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        self.inputs.append(value)
        return value
