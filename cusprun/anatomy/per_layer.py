"""Gives each decoder layer of a Llama-type model its own widths; what the per-layer classes of all families share."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_layer_lists(config: Any) -> None:
    """Raises ValueError where the per-layer lists are missing, of the wrong length or impossible."""
    for key in ("layer_intermediate_sizes", "layer_num_attention_heads", "layer_num_key_value_heads"):
        sizes = getattr(config, key)
        if not isinstance(sizes, list) or len(sizes) != config.num_hidden_layers or min(sizes) < 1:
            raise ValueError(f"{key} must be a list of {config.num_hidden_layers} positive integers, not {sizes!r}")
    pairs = zip(config.layer_num_attention_heads, config.layer_num_key_value_heads, strict=True)
    if any(heads % kv_heads for heads, kv_heads in pairs):
        raise ValueError("each layer's query heads must be a multiple of its kv heads")


def resize_layers(model: Any, config: Any) -> None:
    """Replaces the linear maps of every decoder layer by ones of that layer's widths."""
    for index, layer in enumerate(model.model.layers):
        heads, kv_heads = config.layer_num_attention_heads[index], config.layer_num_key_value_heads[index]
        ffn, hidden, dim = config.layer_intermediate_sizes[index], config.hidden_size, config.head_dim
        layer.self_attn.num_key_value_groups = heads // kv_heads
        for module, name, inputs, outputs in (
            (layer.self_attn, "q_proj", hidden, heads * dim),
            (layer.self_attn, "k_proj", hidden, kv_heads * dim),
            (layer.self_attn, "v_proj", hidden, kv_heads * dim),
            (layer.self_attn, "o_proj", heads * dim, hidden),
            (layer.mlp, "gate_proj", hidden, ffn),
            (layer.mlp, "up_proj", hidden, ffn),
            (layer.mlp, "down_proj", ffn, hidden),
        ):
            biased = getattr(module, name).bias is not None
            setattr(module, name, nn.Linear(inputs, outputs, bias=biased))
        layer.mlp.intermediate_size = ffn
