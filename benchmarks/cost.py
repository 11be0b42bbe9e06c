"""What an artifact costs by its shapes alone: bytes, parameters, multiplications per token; no weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import is_onnx, no_artifact

TORCH_BYTES = 4  # of a number where torch runs a folder: float32, whatever the files hold
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
    weight_bytes: int  # of the matrices that macs_per_token counts, as the runtime holds them: read for every token
    kv_bytes_per_token: int  # keys and values of all layers, of those with a window while a token is in it
    kv_type: str  # that type: f16 in llama.cpp, f32 in torch, the graph's in onnxruntime
    context: int  # tokens that the model was made for
    architecture: str
    tensor_bytes: int  # of all tensors, without headers, tokenizer and configuration


def cost(artifact: Path) -> Cost:
    """Cost of an artifact. Raises InvalidRequest where it is none, Failed where it is damaged."""
    if is_onnx(artifact):
        from cusprun.benchmarks.onnx_cost import graph_cost

        size = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
        graph = graph_cost(artifact)
        return Cost(
            "onnx", graph.quant, size, graph.parameters, graph.macs_per_token, graph.weight_bytes,
            graph.kv_bytes_per_token, graph.kv_type, graph.context, graph.architecture, graph.tensor_bytes,
        )  # fmt: skip
    if artifact.is_dir():
        return _folder_cost(artifact)
    if artifact.suffix != ".gguf":
        raise no_artifact(artifact)
    from cusprun.runtimes.gguf_header import load_metadata

    info = load_metadata(artifact)
    key, value = (int(info.metadata.get(f"{info.architecture}.attention.{kind}_length", info.head_dim))
                  for kind in ("key", "value"))  # fmt: skip
    matrices = (tensor for tensor in info.tensors if len(tensor.shape) == 2)
    return Cost(
        "gguf", info.quant, info.file_bytes, info.parameters, info.macs_per_token,
        weight_bytes=sum(tensor.bytes for tensor in matrices if info.tied or tensor.name != "token_embd.weight"),
        kv_bytes_per_token=sum(layer.kv_heads for layer in info.layers) * (key + value) * 2,
        kv_type="f16",
        context=info.context_length,
        architecture=info.architecture,
        tensor_bytes=sum(tensor.bytes for tensor in info.tensors),
    )  # fmt: skip


def _folder_cost(folder: Path) -> Cost:
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidRequest(f"{folder} has no config.json: name a model folder or a .gguf file")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InvalidRequest(f"{folder} holds no .safetensors file")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        tied = bool(settings.get("tie_word_embeddings", False))
    except (ValueError, AttributeError) as error:
        raise Failed(f"{config} is not a JSON object: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}  # elements by dtype
    stored = 0
    for shard in shards:
        stored += shard.stat().st_size - 8 - int.from_bytes(shard.open("rb").read(8), "little")
        for name, (dtype, shape) in _tensors(shard).items():
            shapes[name] = shape
            sizes[dtype] = sizes.get(dtype, 0) + prod(shape)
    if EMBEDDING not in shapes:
        raise Failed(f"{folder} has no tensor {EMBEDDING}: its weights are those of another kind of model")
    tied = tied or HEAD not in shapes
    if tied:
        shapes.pop(HEAD, None)
    macs = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and (tied or name != EMBEDDING))
    return Cost(
        format="safetensors",
        quant=max(sizes, key=lambda dtype: sizes[dtype]).lower(),
        file_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        parameters=sum(prod(shape) for shape in shapes.values()),
        macs_per_token=macs,
        weight_bytes=macs * TORCH_BYTES,
        kv_bytes_per_token=_cached_numbers(settings, shapes) * TORCH_BYTES,
        kv_type="f32",
        context=int(settings.get("max_position_embeddings", 0)),
        architecture=str(settings.get("model_type", "")),
        tensor_bytes=stored,
    )


def _cached_numbers(settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> int:
    """Keys and values of one token in all layers: the rows of k and v, of a matrix of q, k and v those beside q."""
    rows = sum(shape[0] for name, shape in shapes.items() if name.endswith((".k_proj.weight", ".v_proj.weight")))
    fused = [shape[0] for name, shape in shapes.items() if name.endswith(".qkv_proj.weight")]
    if fused:
        heads = settings["num_attention_heads"]
        head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
        rows += sum(fused) - len(fused) * heads * head_dim
    return rows


def _tensors(shard: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise Failed(f"{shard} is not a whole safetensors file: {error}") from error
