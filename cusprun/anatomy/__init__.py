"""What a model is made of: where its heads, channels, biases and embeddings are, and which tensors are coupled.

:func:`describe` reads a Hugging Face folder's config.json; one short file per family holds what differs between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cusprun.anatomy import gemma2, gemma3, llama, mistral, qwen3, smollm3
from cusprun.anatomy.refusals import why_not
from cusprun.anatomy.sliced import SLICED_TYPE, WHY_NOT, SlicedAnatomy, describe_sliced
from cusprun.anatomy.structure import Anatomy, Coupling, Family, LayerAttention, LayerWidths, read_positive
from cusprun.as_llama import READ
from cusprun.errors import InvalidRequest

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen3.FAMILY,
    smollm3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
)
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}  # and their names in a config.json

__all__ = [
    "FAMILIES",
    "SLICED_TYPE",
    "Anatomy",
    "Coupling",
    "Family",
    "LayerAttention",
    "LayerWidths",
    "SlicedAnatomy",
    "describe",
    "describe_config",
    "describe_sliced",
    "family_of",
    "read_config",
]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises InvalidRequest where there is none or it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InvalidRequest(f"{folder} has no config.json: name a Hugging Face model folder, a hub id or a .gguf file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path} must hold one JSON object")
    return config


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config.json belongs to.

    Raises InvalidRequest for any other, naming the type, what kind of model that is and the families there are.
    """
    model_type = config.get("model_type")
    if model_type == SLICED_TYPE:
        raise InvalidRequest(f"a model of type {SLICED_TYPE} is neither exported nor pruned: {WHY_NOT}")
    for family in FAMILIES:
        if model_type in (family.name, family.per_layer_name):
            return family
    known = ", ".join([*(family.name for family in FAMILIES), *READ])
    raise InvalidRequest(
        f"models of type {model_type!r} are not supported: {why_not(config)}; supported families: {known}"
    )


def describe(folder: Path) -> Anatomy:
    """Reads sizes and couplings of the model in ``folder`` from its config.json; no weight is touched.

    Raises InvalidRequest where the family is unknown or a size is missing or impossible.
    """
    return describe_config(read_config(folder), str(folder))


def describe_config(config: dict[str, Any], folder: str) -> Anatomy:
    """:func:`describe` of a config.json that is read already; ``folder`` names it in messages."""
    family = family_of(config)
    field, names = family.activation_field, ACTIVATIONS[family.activation]
    if config.get(field, names[0]) not in names:
        raise InvalidRequest(f"{folder}: {field} is {config[field]!r}; the gated FFN of {family.name} uses {names[0]}")

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidRequest(f"{folder}/config.json: {key} must be a positive integer, not {value!r}")
        return value

    hidden = size("hidden_size")
    heads = size("num_attention_heads")
    layers = size("num_hidden_layers")
    widths = []
    for index in range(layers):
        per_layer = [
            config[key][index] if isinstance(config.get(key), list) and len(config[key]) == layers else None
            for key in ("layer_intermediate_sizes", "layer_num_attention_heads", "layer_num_key_value_heads")
        ]
        if config.get("model_type") == family.per_layer_name and not all(isinstance(entry, int) for entry in per_layer):
            raise InvalidRequest(f"{folder}/config.json: the per-layer sizes must be three lists of {layers} integers")
        ffn, query, kv = per_layer
        widths.append(
            LayerWidths(
                ffn=size("intermediate_size") if ffn is None else ffn,
                heads=heads if query is None else query,
                kv_heads=size("num_key_value_heads", heads) if kv is None else kv,
            )
        )
    for index, layer in enumerate(widths):
        if not layer.possible(first=index == 0) or not (layer.heads or family.attention_goes):
            raise InvalidRequest(
                f"{folder}/config.json: layer {index} has {layer.heads} query heads on {layer.kv_heads} kv heads, "
                f"{layer.ffn} channels"
            )
    biases = ("attention_bias", "mlp_bias") if config.get("model_type") == family.per_layer_name else family.biases
    return Anatomy(
        family=family,
        hidden_size=hidden,
        head_dim=size("head_dim", hidden // heads),
        vocab_size=size("vocab_size"),
        layers=tuple(widths),
        tied=bool(config.get("tie_word_embeddings", family.tied_default)),
        attention_bias="attention_bias" in biases and bool(config.get("attention_bias", False)),
        mlp_bias="mlp_bias" in biases and bool(config.get("mlp_bias", False)),
        attention=family.attention(config, layers, folder),
        norm_eps=read_positive(config, "rms_norm_eps", 1e-6, folder) or 1e-6,
        **family.scaling(config, folder),
    )
