"""Models that compute what a Llama computes under other names, written once as a Llama-type folder.

Qwen2 and 2.5 have biases on q, k and v; Phi-3 keeps q, k, v and gate, up in one matrix each. As Llama they go through
all that exists for it, llama.cpp's per-layer architecture included, and their logits stay the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.errors import Failed, InvalidRequest

if TYPE_CHECKING:
    import torch

VERSION = 1  # raise when what is written changes
READ = ("qwen2", "phi3")
# Settings of the originals that mean nothing to a Llama, or are written anew.
DROPPED = (
    "use_sliding_window", "max_window_layers", "layer_types", "sliding_window", "auto_map", "resid_pdrop", "embd_pdrop",
    "original_max_position_embeddings", "attention_bias", "mlp_bias", "architectures", "model_type",
)  # fmt: skip


def is_read_as_llama(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a family that is read so."""
    return config.get("model_type") in READ


def llama_config(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """config.json of the Llama, or with a sliding window Mistral, that computes the same; others come back as they are.

    Raises InvalidRequest for variants that no Llama computes.
    """
    if not is_read_as_llama(config):
        return config
    family = config["model_type"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise InvalidRequest(f"{folder}: {family} with rope scaling {kind!r} is not supported; without it, it is")
    rotated = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if rotated != 1.0:
        raise InvalidRequest(
            f"{folder}: this {family} rotates {rotated:g} of each head; only whole heads are supported"
        )
    window = config.get("sliding_window")
    if family == "qwen2":
        if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
            raise InvalidRequest(f"{folder}: qwen2 with use_sliding_window is not supported; without it, it is")
        window = None
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    kept.setdefault("tie_word_embeddings", False)
    if family == "phi3" and "head_dim" not in kept:
        kept["head_dim"] = _size(config, "hidden_size", folder) // _size(config, "num_attention_heads", folder)
    if window is not None:
        return {**kept, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**kept, **names, "attention_bias": family == "qwen2", "mlp_bias": False}


def _size(config: dict[str, Any], key: str, folder: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(f"{folder}/config.json: {key} must be a positive integer, not {value!r}")
    return value


def as_llama(folder: Path) -> Path:
    """The folder itself, or where its family is read as Llama the one written for it in the cache.

    Raises InvalidRequest where the variant is not supported or a tensor is missing or misshapen.
    """
    from cusprun.anatomy import read_config
    from cusprun.checkpoint import COMPANIONS, weight_files
    from cusprun.corpora.cache import cache_folder
    from cusprun.files import sha256_file

    config = read_config(folder)
    if not is_read_as_llama(config):
        return folder
    llama_config(config, str(folder))
    files = [*weight_files(folder), folder / "config.json", *(folder / name for name in COMPANIONS)]
    digests = [f"{path.name} {sha256_file(path)}" for path in files if path.is_file()]
    key = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
    target = cache_folder() / "dense" / f"{config['model_type']}-{key}-{VERSION}"
    if not target.is_dir():
        _write(folder, config, target)
    return target


def _write(folder: Path, config: dict[str, Any], target: Path) -> None:
    from cusprun.anatomy import describe_config
    from cusprun.checkpoint import Weights, weight_files, write_weights
    from cusprun.compact import ELEMENT_BYTES
    from cusprun.dense import copy_companions, digest_of
    from cusprun.files import folder_written_whole, write_json

    weights = Weights(folder)
    written = llama_config(config, str(folder))
    anatomy = describe_config(written, str(folder))
    shapes = dict(anatomy.tensor_shapes())
    sources = _Sources(weights, folder)
    files = weight_files(folder)
    written["cusprun"] = {
        **(config.get("cusprun") or {}),
        "source_sha256": digest_of(files),
        "source_bytes": sum(path.stat().st_size for path in files),
        "read_as_llama": config["model_type"],
    }
    element = ELEMENT_BYTES[weights.dtype(anatomy.family.embedding)]
    with folder_written_whole(target) as part:
        sizes = {name: element * prod(shape) for name, shape in shapes.items()}
        write_weights(part, sources.tensors(shapes), sizes)
        copy_companions(folder, part)
        if (folder / "README.md").is_file():
            (part / "README.md").write_bytes((folder / "README.md").read_bytes())
        write_json(part / "config.json", written)


class _Sources:
    """The Llama's tensors, out of the original's."""

    def __init__(self, weights: Any, folder: Path) -> None:
        self.weights, self.folder = weights, folder

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = None
        for name, shape in shapes.items():
            tensor = self._find(name, shape, shapes)
            dtype = dtype or tensor.dtype
            if tuple(tensor.shape) != shape:
                raise InvalidRequest(
                    f"{self.folder}: {name} would be {list(tensor.shape)}; config.json says {list(shape)}"
                )
            yield name, tensor.to(dtype).contiguous()

    def _find(self, name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
        import torch

        found: torch.Tensor
        if name in self.weights:
            found = self.weights[name]
            return found
        if name.endswith("o_proj.bias"):
            return torch.zeros(shape)
        for fused, parts in (
            ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
        ):
            block, _, inner = fused.rpartition(".")
            prefix, _, last = name.partition(f"{block}.")
            part = last.removesuffix(".weight")
            whole = f"{prefix}{block}.{inner}.weight"
            if part in parts and whole in self.weights:
                rows = [shapes[f"{prefix}{block}.{each}.weight"][0] for each in parts]
                tensor: torch.Tensor = self.weights[whole]
                if tensor.shape[0] != sum(rows):
                    raise InvalidRequest(
                        f"{self.folder}: {whole} has {tensor.shape[0]} rows; config.json says {sum(rows)}"
                    )
                found = tensor.split(rows)[parts.index(part)]
                return found
        raise Failed(f"{self.folder} has no tensor {name}, nor one that holds it")
