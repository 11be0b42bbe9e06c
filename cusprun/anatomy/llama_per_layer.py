"""Llama with widths of its own in every layer, as a transformers model (``model_type`` cusprun_llama)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from cusprun.anatomy.per_layer import FeedForwardOnly, check_layer_lists, resize_layers


@strict
class PerLayerConfig(LlamaConfig):
    """LlamaConfig plus three lists, one entry a layer; the scalar sizes hold the largest of each."""

    model_type = "cusprun_llama"

    layer_intermediate_sizes: list[int] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None

    def validate_architecture(self) -> None:
        """Heads need not divide the hidden size here: head_dim is always explicit."""
        if self.layer_intermediate_sizes is not None:
            check_layer_lists(self)


class LlamaLayerWithoutAttention(FeedForwardOnly, LlamaDecoderLayer):
    """A decoder layer whose attention block is gone."""


class CusprunLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM whose layers have the widths that the config lists."""

    config_class = PerLayerConfig
    _no_split_modules = ["LlamaDecoderLayer", "LlamaLayerWithoutAttention"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layer_lists(config)
        resize_layers(self, config, LlamaLayerWithoutAttention)
        self.post_init()


PerLayerModel = CusprunLlamaForCausalLM
