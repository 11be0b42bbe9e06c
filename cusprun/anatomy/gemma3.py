"""Gemma 3, text alone: Gemma 2 with norms of q and k, five sliding layers to each other one, and two rotary bases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cusprun.anatomy import gemma2
from cusprun.anatomy.structure import LayerAttention
from cusprun.errors import InvalidRequest


def attention(config: dict[str, Any], layers: int, folder: str) -> tuple[LayerAttention, ...]:
    """All but every sixth layer slide, and rotate to a base of their own."""
    period = config.get("sliding_window_pattern", 6)
    if not isinstance(period, int) or period < 1:
        raise InvalidRequest(f"{folder}/config.json: sliding_window_pattern must be a positive integer, not {period!r}")
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
    found = gemma2.attention_of(config, layers, folder, period)
    return tuple(layer if layer.window is None else replace(layer, theta=float(theta)) for layer in found)


def scaling(config: dict[str, Any], folder: str) -> dict[str, float | None]:
    """The query's scale, and a cap of the logits where config.json has one; scores are not capped."""
    found = gemma2.scaling({"final_logit_softcapping": None, **config}, folder)
    return {**found, "attention_softcap": None}


FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3_text",
    per_layer_name="cusprun_gemma3_text",
    config_class="Gemma3TextConfig",
    model_class="Gemma3ForCausalLM",
    theta=1e6,
    qk_norms=True,
    attention=attention,
    scaling=scaling,
)
