"""Gemma 3 with widths of its own in every layer, as a transformers model (``model_type`` cusprun_gemma3_text)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM

from cusprun.anatomy.per_layer import check_layer_lists, resize_layers


@strict
class PerLayerConfig(Gemma3TextConfig):
    """Gemma3TextConfig plus three lists, one entry a layer, and FFN biases; the scalars hold the largest."""

    model_type = "cusprun_gemma3_text"

    layer_intermediate_sizes: list[int] | None = None
    layer_num_attention_heads: list[int] | None = None
    layer_num_key_value_heads: list[int] | None = None
    mlp_bias: bool = False

    def validate_architecture(self) -> None:
        """Heads need not divide the hidden size here: head_dim is always explicit."""
        if self.layer_intermediate_sizes is not None:
            check_layer_lists(self)


class CusprunGemma3ForCausalLM(Gemma3ForCausalLM):
    """Gemma3ForCausalLM whose layers have the widths that the config lists."""

    config_class = PerLayerConfig
    _no_split_modules = ["Gemma3DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_layer_lists(config)
        resize_layers(self, config, None)
        self.post_init()


PerLayerModel = CusprunGemma3ForCausalLM
