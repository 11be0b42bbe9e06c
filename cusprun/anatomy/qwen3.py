"""Qwen3: Llama's tensors without biases, and a norm over each head of q and of k."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cusprun.anatomy import llama
from cusprun.anatomy.structure import LayerAttention
from cusprun.errors import InvalidRequest


def attention(config: dict[str, Any], layers: int, folder: str) -> tuple[LayerAttention, ...]:
    """Every layer sees all that came before. Raises InvalidRequest for the variant in which some do not."""
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise InvalidRequest(f"{folder}: qwen3 with use_sliding_window is not supported; without it, it is")
    return (LayerAttention(),) * layers


FAMILY = replace(
    llama.FAMILY,
    name="qwen3",
    per_layer_name="cusprun_qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3ForCausalLM",
    biases=("attention_bias",),
    heads_divide_hidden=False,
    qk_norms=True,
    attention=attention,
)
