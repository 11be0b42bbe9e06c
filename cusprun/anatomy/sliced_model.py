"""A Llama-type model with a sliced hidden size and a shortcut matrix on every residual connection (SliceGPT)."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


@strict
class SlicedConfig(LlamaConfig):
    """LlamaConfig of the dense model plus what is left of its hidden size, and of the last layer's output."""

    model_type = "cusprun_slicegpt"

    sliced_size: int | None = None
    head_size: int | None = None

    def validate_architecture(self) -> None:
        """Heads need not divide the hidden size here: head_dim is always explicit."""
        if self.sliced_size is not None and not 1 <= self.sliced_size <= self.hidden_size:
            raise ValueError(f"sliced_size must be from 1 to {self.hidden_size}, not {self.sliced_size}")


class WeightlessNorm(nn.Module):
    """RMSNorm whose weights went into the matrices behind it.

    Divides by the root of Σx²/``size``, ``size`` being the dense hidden size however few entries x has.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scaled: torch.Tensor = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.size + self.eps)
        return scaled.to(x.dtype)


class SlicedLayer(LlamaDecoderLayer):
    """A decoder layer between hidden states of sizes of its own: x Q₁ + attention, then y Q₂ + FFN."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.sliced_size
        out = config.head_size if layer_idx == config.num_hidden_layers - 1 else width
        q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        for module, name, inputs, outputs, bias in (
            (self.self_attn, "q_proj", width, q, config.attention_bias),
            (self.self_attn, "k_proj", width, kv, config.attention_bias),
            (self.self_attn, "v_proj", width, kv, config.attention_bias),
            (self.self_attn, "o_proj", q, width, config.attention_bias),
            (self.mlp, "gate_proj", width, config.intermediate_size, config.mlp_bias),
            (self.mlp, "up_proj", width, config.intermediate_size, config.mlp_bias),
            (self.mlp, "down_proj", config.intermediate_size, out, config.mlp_bias),
        ):
            setattr(module, name, nn.Linear(inputs, outputs, bias=bias))
        self.attention_shortcut = nn.Linear(width, width, bias=False)
        self.mlp_shortcut = nn.Linear(width, out, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, WeightlessNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, hidden_states: torch.Tensor, **attention: Any) -> torch.Tensor:  # type: ignore[override]
        """(batch, tokens, width) -> (batch, tokens, width), the last layer's (batch, tokens, head width)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention)
        middle = self.attention_shortcut(hidden_states) + attended
        out: torch.Tensor = self.mlp_shortcut(middle) + self.mlp(self.post_attention_layernorm(middle))
        return out


class CusprunSlicedForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM of sliced layers."""

    config_class = SlicedConfig
    _no_split_modules = ["SlicedLayer"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.sliced_size, config.pad_token_id)
        self.model.layers = nn.ModuleList(SlicedLayer(config, index) for index in range(config.num_hidden_layers))
        self.model.norm = WeightlessNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.head_size, config.vocab_size, bias=False)
        self.post_init()
