"""Gives each decoder layer of a Llama-type model its own widths; what the per-layer classes of all families share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cusprun.anatomy.structure import LayerWidths

LISTS = ("layer_intermediate_sizes", "layer_num_attention_heads", "layer_num_key_value_heads")


def check_layer_lists(config: Any) -> None:
    """Raises ValueError where the per-layer lists are missing, of the wrong length or impossible."""
    for key in LISTS:
        sizes = getattr(config, key)
        if not isinstance(sizes, list) or len(sizes) != config.num_hidden_layers:
            raise ValueError(f"{key} must be a list of {config.num_hidden_layers} integers, not {sizes!r}")
    for index, widths in enumerate(layer_widths(config)):
        if not widths.possible(first=index == 0):
            raise ValueError(
                f"layer {index} cannot have {widths.heads} query heads on {widths.kv_heads} kv heads and {widths.ffn} "
                "channels: query heads are a multiple of kv heads, channels are one at least, and only layers after "
                "the first go without heads"
            )


def layer_widths(config: Any) -> list[LayerWidths]:
    """The widths that a per-layer config lists."""
    return [LayerWidths(*sizes) for sizes in zip(*(getattr(config, key) for key in LISTS), strict=True)]


class FeedForwardOnly:
    """What makes a family's decoder layer one without attention: to be put in front of it among the bases."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        del self.self_attn, self.input_layernorm  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same; mask, positions and cache are not needed."""
        changed: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))  # type: ignore[attr-defined]
        return changed


def resize_layers(model: Any, config: Any, without_attention: type | None) -> None:
    """Replaces the linear maps of every decoder layer by ones of that layer's widths.

    Layers without heads become ``without_attention``; they leave their place in the cache empty. Raises ValueError
    where there are such layers and the family has no class for them.
    """
    attention_bias, mlp_bias = bool(config.attention_bias), bool(config.mlp_bias)
    for index, widths in enumerate(layer_widths(config)):
        if widths.heads == 0:
            if without_attention is None:
                raise ValueError(f"layer {index} has no heads, and {config.model_type} computes no layer without")
            model.model.layers[index] = without_attention(config, index)
        layer, hidden = model.model.layers[index], config.hidden_size
        maps = [
            (layer.mlp, "gate_proj", hidden, widths.ffn, mlp_bias),
            (layer.mlp, "up_proj", hidden, widths.ffn, mlp_bias),
            (layer.mlp, "down_proj", widths.ffn, hidden, mlp_bias),
        ]
        layer.mlp.intermediate_size = widths.ffn
        if widths.heads:
            layer.self_attn.num_key_value_groups = widths.queries_per_kv
            queries, kv = widths.heads * config.head_dim, widths.kv_heads * config.head_dim
            maps += [
                (layer.self_attn, "q_proj", hidden, queries, attention_bias),
                (layer.self_attn, "k_proj", hidden, kv, attention_bias),
                (layer.self_attn, "v_proj", hidden, kv, attention_bias),
                (layer.self_attn, "o_proj", queries, hidden, attention_bias),
            ]
        for module, name, inputs, outputs, biased in maps:
            setattr(module, name, nn.Linear(inputs, outputs, bias=biased))
