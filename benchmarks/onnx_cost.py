"""What an ONNX decoder costs by its graph alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cusprun.errors import Failed
from cusprun.runtimes import GENAI_CONFIG

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
PAST = "past_key_values."
LOOK_UPS = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class GraphCost:
    """As in :class:`cusprun.benchmarks.cost.Cost`."""

    quant: str
    parameters: int
    macs_per_token: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_type: str
    context: int
    architecture: str
    tensor_bytes: int


def graph_cost(folder: Path) -> GraphCost:
    """Sizes of the graph in an ONNX folder. Raises Failed where none loads."""
    import onnx

    try:
        config = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
        name = Path(config["model"]["decoder"]["filename"]).name
        graph = onnx.load(str(folder / name), load_external_data=False).graph
    except Exception as error:  # onnx raises its parser's own
        raise Failed(f"{folder} holds no graph that onnx reads: {error!r}") from error
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    alias = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    multiplied: dict[str, int] = {}  # initializer -> weights
    looked_up: dict[str, int] = {}
    read: set[str] = set()  # every initializer of a product: weights, scales, zero points
    vectors: set[str] = set()
    bits = set()
    for node in graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type in (*PRODUCTS, "MatMulNBits"):
            read.update(alias.get(name, name) for name in node.input)
        if node.op_type == "MatMulNBits":
            multiplied[node.input[1]] = attributes["K"] * attributes["N"]
            bits.add(f"int{attributes['bits']}")
            vectors.update(node.input[5:6])
        elif node.op_type in PRODUCTS and node.input[1] in shapes:
            multiplied[node.input[1]] = prod(shapes[node.input[1]])
            quantized = node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
            bits.add("int8" if quantized else _element(graph, node.input[1]))
            vectors.update(node.input[4:5])
        elif node.op_type in LOOK_UPS and len(shapes.get(alias.get(node.input[0], node.input[0]), ())) > 1:
            table = alias.get(node.input[0], node.input[0])
            blocks = attributes.get("block_size")
            looked_up[table] = prod(shapes[node.input[2]]) * blocks if blocks else prod(shapes[table])
        elif node.op_type.endswith("LayerNormalization") or node.op_type in ("Add", "Mul"):
            vectors.update(name for name in node.input if len(shapes.get(name, ())) == 1)
    known = folder / "cusprun.json"
    kind = str(json.loads(known.read_text(encoding="utf-8"))["quant"]) if known.is_file() else min(bits, default="")
    parameters = sum({**looked_up, **multiplied}.values()) + sum(_sizes(vectors, shapes))
    kv_bytes, kv_type = _cache(graph, config["model"]["decoder"])
    return GraphCost(
        kind, parameters, sum(multiplied.values()),
        weight_bytes=sum(_bytes(tensor) for tensor in graph.initializer if tensor.name in read),
        kv_bytes_per_token=kv_bytes, kv_type=kv_type, context=int(config["model"]["context_length"]),
        architecture=str(config["model"].get("type", "")),
        tensor_bytes=sum(map(_bytes, graph.initializer)),
    )  # fmt: skip


def _bytes(tensor: Any) -> int:
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-prod(tensor.dims) // 2)
    return int(prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _cache(graph: Any, decoder: dict[str, Any]) -> tuple[int, str]:
    """Bytes that a token takes in the cache of all layers, and their type."""
    from onnx.helper import tensor_dtype_to_np_dtype

    total, kind = 0, ""
    for value in graph.input:
        if value.name.startswith(PAST):
            element = tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            heads, size = (value.type.tensor_type.shape.dim[at].dim_value for at in (1, 3))  # 0 where it has a name
            total += (heads or decoder["num_key_value_heads"]) * (size or decoder["head_size"]) * element.itemsize
            kind = {2: "f16", 4: "f32"}.get(element.itemsize, element.name)
    return int(total), kind


def _sizes(names: set[str], shapes: dict[str, tuple[int, ...]]) -> Iterator[int]:
    return (prod(shapes[name]) for name in names if name in shapes)


def _element(graph: Any, name: str) -> str:
    import onnx

    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    return {onnx.TensorProto.FLOAT16: "fp16"}.get(tensor.data_type, "fp32")
