"""Mistral: Llama's tensors without biases, with an optional sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cusprun.anatomy import llama
from cusprun.anatomy.structure import LayerAttention


def attention(config: dict[str, Any], layers: int, folder: str) -> tuple[LayerAttention, ...]:
    """The same window in every layer; one of 4096 where config.json does not speak of it, as in transformers."""
    return (LayerAttention(window=config.get("sliding_window", 4096)),) * layers


FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    per_layer_name="cusprun_mistral",
    config_class="MistralConfig",
    model_class="MistralForCausalLM",
    biases=(),
    attention=attention,
    heads_divide_hidden=False,
)
