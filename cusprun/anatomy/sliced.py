"""Sizes of a model whose hidden size was sliced by SliceGPT; :mod:`cusprun.anatomy.sliced_model` holds its classes.

Every residual connection carries a matrix there (a shortcut), the norms have no weights, and the output head is a
matrix of its own even where the dense model ties it to the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cusprun.anatomy.structure import Anatomy, Family
from cusprun.errors import InvalidRequest

SLICED_TYPE = "cusprun_slicegpt"
SLICEABLE = ("llama", "mistral")
SLICED_CLASS = "CusprunSlicedForCausalLM"
WHY_NOT = (
    "it was sliced by slicegpt and holds a matrix on every residual connection, which no stock architecture of GGUF or "
    "ONNX has; it runs with torch, and what is to be exported or pruned further comes from another method"
)


@dataclass(frozen=True)
class SlicedAnatomy:
    """``dense`` says what the model was; ``width`` is what is left of its hidden size.

    ``head_width`` is the width of the last layer's output, which the output head reads.
    """

    dense: Anatomy
    width: int
    head_width: int

    @property
    def family(self) -> Family:
        return self.dense.family

    @property
    def vocab_size(self) -> int:
        return self.dense.vocab_size

    @property
    def tied(self) -> bool:
        """Never: the embedding and the head are rotated by different matrices."""
        return False

    @property
    def parameters(self) -> int:
        """All parameters, shortcuts included."""
        return sum(prod(shape) for _, shape in self.tensor_shapes())

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of all matrices for one token, shortcuts and head included."""
        shapes = (shape for name, shape in self.tensor_shapes() if name != self.family.embedding)
        return sum(prod(shape) for shape in shapes if len(shape) == 2)

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that a checkpoint holds, with its shape, in file order."""
        dense, width = self.dense, self.width
        yield self.family.embedding, (dense.vocab_size, width)
        for index, layer in enumerate(dense.layers):
            prefix, last = dense.prefix(index), index == len(dense.layers) - 1
            out, q, kv = (
                self.head_width if last else width,
                layer.heads * dense.head_dim,
                layer.kv_heads * dense.head_dim,
            )
            for name, rows, columns, bias in (
                ("self_attn.q_proj", q, width, dense.attention_bias),
                ("self_attn.k_proj", kv, width, dense.attention_bias),
                ("self_attn.v_proj", kv, width, dense.attention_bias),
                ("self_attn.o_proj", width, q, dense.attention_bias),
                ("attention_shortcut", width, width, False),
                ("mlp.gate_proj", layer.ffn, width, dense.mlp_bias),
                ("mlp.up_proj", layer.ffn, width, dense.mlp_bias),
                ("mlp.down_proj", out, layer.ffn, dense.mlp_bias),
                ("mlp_shortcut", out, width, False),
            ):
                yield f"{prefix}{name}.weight", (rows, columns)
                if bias:
                    yield f"{prefix}{name}.bias", (rows,)
        yield self.family.output, (dense.vocab_size, self.head_width)


def check_sliceable(anatomy: Anatomy) -> None:
    """Raises InvalidRequest where the family is not one that the sliced classes compute."""
    if anatomy.family.name not in SLICEABLE:
        raise InvalidRequest(
            f"--method slicegpt is not described for {anatomy.family.name}: it slices {', '.join(SLICEABLE)}; choose "
            "another method"
        )


def describe_sliced(folder: Path) -> SlicedAnatomy:
    """Sizes of the sliced model in ``folder``, from its config.json.

    Raises InvalidRequest where a size is missing or impossible.
    """
    from cusprun.anatomy import describe_config, read_config

    config = read_config(folder)
    dense = describe_config({**config, "model_type": "llama"}, str(folder))
    sizes: list[Any] = [config.get(key) for key in ("sliced_size", "head_size")]
    if not all(isinstance(size, int) and 1 <= size <= dense.hidden_size for size in sizes):
        raise InvalidRequest(
            f"{folder}/config.json: sliced_size and head_size must be from 1 to {dense.hidden_size}, not {sizes}"
        )
    return SlicedAnatomy(dense, *sizes)
