"""The keys of a GGUF file that are neither tensors nor tokenizer: sizes of the model, and who made it from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, LlamaFileType, RopeScalingType, size_label

from cusprun.anatomy import Anatomy, family_of
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf_tensors import Rope
from cusprun.layouts import find_host, slides

# Keys that ``metadata`` may hold, beside any of one's own that starts with "cusprun.".
GENERAL = ("author", "description", "license", "license_name", "license_link", "organization", "url", "version")
LISTS = ("languages", "tags")  # written with commas: "en, de"
BASE = ("base_model", "base_model_url", "base_model_organization")
DATASETS = ("datasets",)  # names, with commas


def architecture(anatomy: Anatomy) -> str:
    """llama.cpp's architecture that holds the model. Raises InvalidRequest where there is none."""
    return find_host(anatomy).arch


def context_length(config: Mapping[str, Any]) -> int:
    """The longest text that torch and llama.cpp compute alike.

    Where llama.cpp's architecture attends to everything, a sliding window (Mistral) ends the context where it starts
    to slide.
    """
    longest = int(config.get("max_position_embeddings") or 2048)
    window = None if slides(family_of(config)) else config.get("sliding_window")
    return min(longest, int(window)) if window else longest


def write_sizes(writer: GGUFWriter, anatomy: Anatomy, config: Mapping[str, Any], rope: Rope) -> None:
    """Adds the hyperparameters to ``writer``; lists, one entry a layer, where the layers differ."""
    writer.add_block_count(len(anatomy.layers))
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(anatomy.hidden_size)
    writer.add_vocab_size(anatomy.vocab_size)
    if anatomy.uniform:
        layer = anatomy.layers[0]
        writer.add_feed_forward_length(layer.ffn)
        writer.add_head_count(layer.heads)
        writer.add_head_count_kv(layer.kv_heads)
    else:
        writer.add_feed_forward_length([layer.ffn for layer in anatomy.layers])
        writer.add_head_count([layer.heads for layer in anatomy.layers])
        writer.add_head_count_kv([layer.kv_heads for layer in anatomy.layers])
    writer.add_key_length(anatomy.head_dim)
    writer.add_value_length(anatomy.head_dim)
    writer.add_rope_dimension_count(anatomy.head_dim)
    writer.add_layer_norm_rms_eps(anatomy.norm_eps)
    for window in {layer.window for layer in anatomy.attention if slides(anatomy.family)} - {None}:
        writer.add_sliding_window(window)  # the sliding layers of a model share one
    for theta in {layer.theta for layer in anatomy.attention} - {None}:
        writer.add_rope_freq_base_swa(theta)
    if anatomy.attention_softcap is not None:
        writer.add_attn_logit_softcapping(anatomy.attention_softcap)
    if anatomy.output_softcap is not None:
        writer.add_final_logit_softcapping(anatomy.output_softcap)
    writer.add_rope_freq_base(rope.theta)
    if rope.linear_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear_factor)


def write_general(
    writer: GGUFWriter, name: str, parameters: int, file_type: LlamaFileType, metadata: Mapping[str, str]
) -> None:
    """Adds general.*: name, type, size label, and what ``metadata`` says of licence, base model, languages and tags."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(parameters, parameters, 0, 0))
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for key, value in metadata.items():
        if key in GENERAL:
            writer.add_string(f"general.{key}", value)
        elif key in LISTS:
            writer.add_array(f"general.{key}", _split(value))
        elif key.startswith("cusprun."):
            writer.add_string(key, value)
    if "base_model" in metadata:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, metadata["base_model"])
        writer.add_base_model_organization(0, metadata.get("base_model_organization", ""))
        writer.add_base_model_repo_url(0, metadata.get("base_model_url", ""))
    datasets = _split(metadata.get("datasets", ""))
    if datasets:
        writer.add_dataset_count(len(datasets))
        for index, dataset in enumerate(datasets):
            writer.add_dataset_name(index, dataset)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises InvalidRequest for a key that no GGUF reader knows."""
    known = (*GENERAL, *LISTS, *BASE, *DATASETS)
    wrong = [key for key in metadata if key not in known and not key.startswith("cusprun.")]
    if wrong:
        raise InvalidRequest(f"metadata key {wrong[0]!r} is unknown: write one of {', '.join(known)}, or cusprun.<key>")


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]
