"""SmolLM3 with widths of its own in every layer, as a transformers model (``model_type`` cusprun_smollm3)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM

from cusprun.anatomy.per_layer import FeedForwardOnly, check_layer_lists, resize_layers


@strict
class PerLayerConfig(SmolLM3Config):
    """SmolLM3Config plus three lists, one entry a layer; the scalar sizes hold the largest of each."""

    model_type = "cusprun_smollm3"

    layer_intermediate_sizes: list[int] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None


class SmolLM3LayerWithoutAttention(FeedForwardOnly, SmolLM3DecoderLayer):
    """A decoder layer whose attention block is gone."""


class CusprunSmolLM3ForCausalLM(SmolLM3ForCausalLM):
    """SmolLM3ForCausalLM whose layers have the widths that the config lists."""

    config_class = PerLayerConfig
    _no_split_modules = ["SmolLM3DecoderLayer", "SmolLM3LayerWithoutAttention"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layer_lists(config)
        resize_layers(self, config, SmolLM3LayerWithoutAttention)
        self.post_init()


PerLayerModel = CusprunSmolLM3ForCausalLM
