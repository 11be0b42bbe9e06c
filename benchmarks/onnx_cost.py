"""What an ONNX decoder costs by its graph alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from cusprun.errors import Failed
from cusprun.runtimes import GENAI_CONFIG

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
LOOK_UPS = ("Gather", "GatherBlockQuantized")


def graph_cost(folder: Path) -> tuple[str, int, int]:
    """Type, parameters and multiplications a token of the graph in an ONNX folder. Raises Failed where none loads."""
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
    vectors: set[str] = set()
    bits = set()
    for node in graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
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
    return kind, parameters, sum(multiplied.values())


def _sizes(names: set[str], shapes: dict[str, tuple[int, ...]]) -> Iterator[int]:
    return (prod(shapes[name]) for name in names if name in shapes)


def _element(graph: Any, name: str) -> str:
    import onnx

    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    return {onnx.TensorProto.FLOAT16: "fp16"}.get(tensor.data_type, "fp32")
