"""A model whose layers have widths of their own, as one whose layers are alike: the same function, larger tensors.

Narrow layers are filled up with channels and heads of zeros, which add exactly nothing. So programs that expect one
width for all layers run it, at the cost of the widest layer's size in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.anatomy import Anatomy, LayerWidths, describe, read_config
from cusprun.checkpoint import Weights, expert_config, write_weights
from cusprun.compact import DTYPES, ELEMENT_BYTES
from cusprun.dense import copy_companions
from cusprun.errors import InvalidRequest
from cusprun.files import folder_written_whole, write_json

if TYPE_CHECKING:
    import torch


def fill_up(model: Path, out: Path) -> Anatomy:
    """Writes the model folder ``out`` with one width for all layers, and returns its sizes.

    Raises InvalidRequest where groups of query heads differ from layer to layer, which no filling makes alike.
    """
    anatomy = describe(model)
    groups = {layer.queries_per_kv for layer in anatomy.layers if layer.heads}
    if len(groups) != 1:
        raise InvalidRequest(f"{model}: query heads per kv head differ from layer to layer: {sorted(groups)}")
    widest = LayerWidths(
        ffn=max(layer.ffn for layer in anatomy.layers),
        heads=max(layer.heads for layer in anatomy.layers),
        kv_heads=max(layer.kv_heads for layer in anatomy.layers),
    )
    uniform = anatomy.with_layers([widest] * len(anatomy.layers))
    weights, shapes = Weights(model), dict(uniform.tensor_shapes())
    dtype = weights.dtype(anatomy.family.embedding)
    sizes = {name: prod(shape) * ELEMENT_BYTES[_dtype(weights, name, dtype)] for name, shape in shapes.items()}
    with folder_written_whole(out) as part:
        write_weights(part, _tensors(weights, shapes, dtype), sizes)
        copy_companions(model, part)
        write_json(part / "config.json", expert_config(read_config(model), uniform))
    return uniform


def _dtype(weights: Weights, name: str, default: str) -> str:
    return weights.dtype(name) if name in weights else default


def _tensors(weights: Weights, shapes: dict[str, tuple[int, ...]], default: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, what there was of it in the corner before the first row and column that are new."""
    import torch

    for name, shape in shapes.items():
        dtype = getattr(torch, DTYPES[_dtype(weights, name, default)])
        if name not in weights:  # of an attention block that was gone
            yield name, torch.ones(shape, dtype=dtype) if "norm" in name else torch.zeros(shape, dtype=dtype)
            continue
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            filled = torch.zeros(shape, dtype=dtype)
            filled[tuple(slice(length) for length in tensor.shape)] = tensor
            tensor = filled
        yield name, tensor
