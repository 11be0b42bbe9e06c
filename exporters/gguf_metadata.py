"""The keys of a GGUF file that are neither tensors nor tokenizer: sizes of the model, and who made it from what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFWriter, LlamaFileType, RopeScalingType, size_label

from cusprun.anatomy import Anatomy, family_of
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf_config import read_number
from cusprun.exporters.gguf_tensors import Rope
from cusprun.layouts import find_host, slides

# Keys that ``metadata`` may hold, beside any of one's own that starts with "cusprun.".
GENERAL = {
    key: f"general.{key.replace('license_', 'license.')}"
    for key in ("author", "description", "license", "license_name", "license_link", "organization", "url", "version")
}
LISTS = ("languages", "tags")  # lists, or written with commas: "en, de"
ORIGINS = {  # lists of names, hub ids or addresses: the key they go to, and what a hub id stands below
    "base_model": ("base_model", "https://huggingface.co"),
    "datasets": ("dataset", "https://huggingface.co/datasets"),
}
Metadata = Mapping[str, str | Sequence[str]]


def architecture(anatomy: Anatomy) -> str:
    """llama.cpp's architecture that holds the model. Raises InvalidRequest where there is none."""
    return find_host(anatomy).arch


def context_length(config: Mapping[str, Any]) -> int:
    """The longest text that torch and llama.cpp compute alike.

    Where llama.cpp's architecture attends to everything, a sliding window (Mistral) ends the context where it starts
    to slide.
    """
    longest = int(read_number(config, "max_position_embeddings", 2048))
    if slides(family_of(dict(config))) or not config.get("sliding_window"):
        return longest
    return min(longest, int(read_number(config, "sliding_window")))


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
    read_number(config, "rms_norm_eps", anatomy.norm_eps)
    writer.add_layer_norm_rms_eps(anatomy.norm_eps)
    sliding = anatomy.attention if slides(anatomy.family) else ()
    for window in {layer.window for layer in sliding if layer.window is not None}:
        writer.add_sliding_window(window)  # the sliding layers of a model share one
    for theta in {layer.theta for layer in anatomy.attention if layer.theta is not None}:
        writer.add_rope_freq_base_swa(theta)
    if anatomy.attention_softcap is not None:
        writer.add_attn_logit_softcapping(anatomy.attention_softcap)
    if anatomy.output_softcap is not None:
        writer.add_final_logit_softcapping(anatomy.output_softcap)
    writer.add_rope_freq_base(rope.theta)
    if rope.linear_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.linear_factor)


def write_general(writer: GGUFWriter, name: str, parameters: int, file_type: LlamaFileType, metadata: Metadata) -> None:
    """Adds general.*: name, type, size label, and what ``metadata`` says of licence, base model, languages and tags."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(parameters, parameters, 0, 0))
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for key, value in metadata.items():
        if key in GENERAL or key.startswith("cusprun."):
            text = value if isinstance(value, str) else ", ".join(value)
            writer.add_string(GENERAL.get(key, key), text)
        elif key in LISTS:
            writer.add_array(f"general.{key}", _split(value))
    for key, (name_of, hub) in ORIGINS.items():
        origins = _split(metadata.get(key, ""))
        if origins:
            writer.add_uint32(f"general.{name_of}.count", len(origins))
        for index, origin in enumerate(origins):
            for field, text in _origin(origin, hub).items():
                writer.add_string(f"general.{name_of}.{index}.{field}", text)


def _origin(identity: str, hub: str) -> dict[str, str]:
    """Name, organization and repo_url of a hub id, owner/name, or of its address below ``hub``; of others their name.

    What is not known is not written.
    """
    inner = identity.removeprefix(f"{hub}/")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", inner):
        owner, _, name = inner.partition("/")
        return {"name": name, "organization": owner, "repo_url": f"{hub}/{inner}"}
    if re.match(r"https?://", identity):
        return {"name": identity.rstrip("/").rpartition("/")[2], "repo_url": identity}
    return {"name": identity}


def check_metadata(metadata: Metadata) -> None:
    """Raises InvalidRequest for a key that no GGUF reader knows."""
    known = (*GENERAL, *LISTS, *ORIGINS)
    wrong = [key for key in metadata if key not in known and not key.startswith("cusprun.")]
    if wrong:
        raise InvalidRequest(f"metadata key {wrong[0]!r} is unknown: write one of {', '.join(known)}, or cusprun.<key>")


def _split(value: str | Sequence[str]) -> list[str]:
    return list(value) if not isinstance(value, str) else [part.strip() for part in value.split(",") if part.strip()]
