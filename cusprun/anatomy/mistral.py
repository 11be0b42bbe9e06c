"""Mistral: Llama's tensors without biases, with an optional sliding window."""

from __future__ import annotations

from dataclasses import replace

from cusprun.anatomy import llama

FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    per_layer_name="cusprun_mistral",
    config_class="MistralConfig",
    model_class="MistralForCausalLM",
    biases=False,
    heads_divide_hidden=False,
)
