"""Gemma 2: a norm behind each block as well, every other layer with a sliding window, capped scores and logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cusprun.anatomy import llama
from cusprun.anatomy.structure import LayerAttention, read_positive
from cusprun.errors import InvalidRequest

KINDS = ("full_attention", "sliding_attention")


def attention_of(config: dict[str, Any], layers: int, folder: str, period: int) -> tuple[LayerAttention, ...]:
    """Which layers slide: as config.json lists it, or all but every ``period``-th. Raises InvalidRequest for others."""
    if config.get("use_bidirectional_attention"):
        raise InvalidRequest(f"{folder} attends in both directions: decoders that continue a text are pruned")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [KINDS[(index + 1) % period != 0] for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS):
        raise InvalidRequest(f"{folder}/config.json: layer_types must be a list of {layers}, each {' or '.join(KINDS)}")
    window = config.get("sliding_window", 4096)
    if "sliding_attention" in kinds and (not isinstance(window, int) or window < 1):
        raise InvalidRequest(f"{folder}/config.json: sliding_window must be a positive integer, not {window!r}")
    return tuple(LayerAttention(window=window if kind == "sliding_attention" else None) for kind in kinds)


def attention(config: dict[str, Any], layers: int, folder: str) -> tuple[LayerAttention, ...]:
    """Every other layer slides, the first does."""
    return attention_of(config, layers, folder, 2)


def attention_settings(attention: Sequence[LayerAttention]) -> dict[str, Any]:
    """The list that tells which layers slide."""
    return {"layer_types": [KINDS[layer.window is not None] for layer in attention]}


def scaling(config: dict[str, Any], folder: str) -> dict[str, float | None]:
    """The query's scale and both caps, with transformers' defaults."""
    scalar = read_positive(config, "query_pre_attn_scalar", 256, folder)
    return {
        "query_scale": None if scalar is None else scalar**-0.5,
        "attention_softcap": read_positive(config, "attn_logit_softcapping", 50.0, folder),
        "output_softcap": read_positive(config, "final_logit_softcapping", 30.0, folder),
    }


FAMILY = replace(
    llama.FAMILY,
    name="gemma2",
    per_layer_name="cusprun_gemma2",
    config_class="Gemma2Config",
    model_class="Gemma2ForCausalLM",
    biases=("attention_bias",),
    tied_default=True,
    activation="gelu_tanh",
    activation_field="hidden_activation",
    ffn_norm="pre_feedforward_layernorm",
    attention_norm_behind="post_attention_layernorm",
    ffn_norm_behind="post_feedforward_layernorm",
    norm_offset=1.0,
    scales_embedding=True,
    attention_goes=False,
    attention=attention,
    attention_settings=attention_settings,
    scaling=scaling,
)
