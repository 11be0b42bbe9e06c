"""Qwen3 with widths of its own in every layer, as a transformers model (``model_type`` cusprun_qwen3)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

from cusprun.anatomy.per_layer import FeedForwardOnly, check_layer_lists, resize_layers


@strict
class PerLayerConfig(Qwen3Config):
    """Qwen3Config plus three lists, one entry a layer, and FFN biases; the scalar sizes hold the largest of each."""

    model_type = "cusprun_qwen3"

    layer_intermediate_sizes: list[int] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None
    mlp_bias: bool = False


class Qwen3LayerWithoutAttention(FeedForwardOnly, Qwen3DecoderLayer):
    """A decoder layer whose attention block is gone."""


class CusprunQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3ForCausalLM whose layers have the widths that the config lists."""

    config_class = PerLayerConfig
    _no_split_modules = ["Qwen3DecoderLayer", "Qwen3LayerWithoutAttention"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layer_lists(config)
        resize_layers(self, config, Qwen3LayerWithoutAttention)
        self.post_init()


PerLayerModel = CusprunQwen3ForCausalLM
