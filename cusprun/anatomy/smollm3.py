"""SmolLM3: Llama's tensors; some layers, every fourth as published, do not rotate q and k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cusprun.anatomy import llama
from cusprun.anatomy.structure import LayerAttention
from cusprun.errors import InvalidRequest


def attention(config: dict[str, Any], layers: int, folder: str) -> tuple[LayerAttention, ...]:
    """Which layers rotate. Raises InvalidRequest where config.json does not say it of all, or some layers slide."""
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise InvalidRequest(f"{folder}: smollm3 with use_sliding_window is not supported; without it, it is")
    interval = config.get("no_rope_layer_interval", 4)
    rotates = config.get("no_rope_layers")
    if rotates is None and isinstance(interval, int) and interval > 0:
        rotates = [(index + 1) % interval != 0 for index in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers:
        raise InvalidRequest(f"{folder}/config.json: no_rope_layers must be a list of {layers} numbers 0 or 1")
    return tuple(LayerAttention(rotates=bool(value)) for value in rotates[:layers])


def attention_settings(attention: Sequence[LayerAttention]) -> dict[str, Any]:
    """The list that tells which layers rotate."""
    return {"no_rope_layers": [int(layer.rotates) for layer in attention]}


FAMILY = replace(
    llama.FAMILY,
    name="smollm3",
    per_layer_name="cusprun_smollm3",
    config_class="SmolLM3Config",
    model_class="SmolLM3ForCausalLM",
    tied_default=True,
    theta=2e6,
    heads_divide_hidden=False,
    attention=attention,
    attention_settings=attention_settings,
)
