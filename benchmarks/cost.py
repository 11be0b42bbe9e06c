"""What an artifact costs by its shapes alone: bytes, parameters, multiplications per token; no weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import is_onnx, no_artifact

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Cost:
    """Sizes of one artifact. ``macs_per_token`` counts each weight matrix once, the output head included.

    The embedding look-up multiplies nothing; attention scores depend on the context and are left out.
    """

    format: str  # "gguf", "onnx" or "safetensors"
    quant: str  # llama.cpp's file type, or the dtype of a folder's largest tensors: f32, bf16, q8_0, q4_k_m ...
    file_bytes: int  # the .gguf, everything in the model folder, or graph and weights of the ONNX folder
    parameters: int  # tied embeddings once
    macs_per_token: int


def cost(artifact: Path) -> Cost:
    """Cost of an artifact. Raises InvalidRequest where it is none, Failed where it is damaged."""
    if is_onnx(artifact):
        from cusprun.benchmarks.onnx_cost import graph_cost

        size = sum(file.stat().st_size for file in artifact.glob("*.onnx*"))
        kind, parameters, macs = graph_cost(artifact)
        return Cost("onnx", kind, size, parameters, macs)
    if artifact.is_dir():
        return _folder_cost(artifact)
    if artifact.suffix != ".gguf":
        raise no_artifact(artifact)
    from cusprun.runtimes.gguf_header import load_metadata

    info = load_metadata(artifact)
    return Cost("gguf", info.quant, info.file_bytes, info.parameters, info.macs_per_token)


def _folder_cost(folder: Path) -> Cost:
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidRequest(f"{folder} has no config.json: name a model folder or a .gguf file")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InvalidRequest(f"{folder} holds no .safetensors file")
    try:
        tied = bool(json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings", False))
    except (ValueError, AttributeError) as error:
        raise Failed(f"{config} is not a JSON object: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}  # elements by dtype
    for shard in shards:
        for name, (dtype, shape) in _tensors(shard).items():
            shapes[name] = shape
            sizes[dtype] = sizes.get(dtype, 0) + prod(shape)
    if EMBEDDING not in shapes:
        raise Failed(f"{folder} has no tensor {EMBEDDING}: its weights are those of another kind of model")
    tied = tied or HEAD not in shapes
    if tied:
        shapes.pop(HEAD, None)
    matrices = (prod(shape) for name, shape in shapes.items() if len(shape) == 2 and (tied or name != EMBEDDING))
    return Cost(
        format="safetensors",
        quant=max(sizes, key=lambda dtype: sizes[dtype]).lower(),
        file_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        parameters=sum(prod(shape) for shape in shapes.values()),
        macs_per_token=sum(matrices),
    )


def _tensors(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise Failed(f"{shard} is not a whole safetensors file: {error}") from error
