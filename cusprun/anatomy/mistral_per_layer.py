"""Mistral with widths of its own in every layer, as a transformers model (``model_type`` cusprun_mistral)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from cusprun.anatomy.per_layer import check_layer_lists, resize_layers


@strict
class PerLayerConfig(MistralConfig):
    """MistralConfig plus three lists, one entry a layer; the scalar sizes hold the largest of each."""

    model_type = "cusprun_mistral"

    layer_intermediate_sizes: list[int] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None


class CusprunMistralForCausalLM(MistralForCausalLM):
    """MistralForCausalLM whose layers have the widths that the config lists."""

    config_class = PerLayerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layer_lists(config)
        resize_layers(self, config)
        self.post_init()


PerLayerModel = CusprunMistralForCausalLM
