"""Mistral with widths of its own in every layer, as a transformers model (``model_type`` cusprun_mistral)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM

from cusprun.anatomy.per_layer import FeedForwardOnly, check_layer_lists, resize_layers


@strict
class PerLayerConfig(MistralConfig):
    """MistralConfig plus three lists, one entry a layer, and biases; the scalar sizes hold the largest of each."""

    model_type = "cusprun_mistral"

    layer_intermediate_sizes: list[int] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False


class MistralLayerWithoutAttention(FeedForwardOnly, MistralDecoderLayer):
    """A decoder layer whose attention block is gone."""


class CusprunMistralForCausalLM(MistralForCausalLM):
    """MistralForCausalLM whose layers have the widths that the config lists."""

    config_class = PerLayerConfig
    _no_split_modules = ["MistralDecoderLayer", "MistralLayerWithoutAttention"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layer_lists(config)
        resize_layers(self, config, MistralLayerWithoutAttention)
        self.post_init()


PerLayerModel = CusprunMistralForCausalLM
