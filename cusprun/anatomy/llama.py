"""Llama-type models: SmolLM2, Llama 2 and 3. A channel couples gate, up and down; a kv group couples q, k, v and o."""

from __future__ import annotations

from cusprun.anatomy.structure import Coupling, Family

COUPLINGS = (
    Coupling("mlp.gate_proj.weight", "ffn", 0),
    Coupling("mlp.gate_proj.bias", "ffn", 0),
    Coupling("mlp.up_proj.weight", "ffn", 0),
    Coupling("mlp.up_proj.bias", "ffn", 0),
    Coupling("mlp.down_proj.weight", "ffn", 1),
    Coupling("self_attn.q_proj.weight", "heads", 0),
    Coupling("self_attn.q_proj.bias", "heads", 0),
    Coupling("self_attn.k_proj.weight", "kv_heads", 0),
    Coupling("self_attn.k_proj.bias", "kv_heads", 0),
    Coupling("self_attn.v_proj.weight", "kv_heads", 0),
    Coupling("self_attn.v_proj.bias", "kv_heads", 0),
    Coupling("self_attn.o_proj.weight", "heads", 1),
)

FAMILY = Family(
    name="llama",
    per_layer_name="cusprun_llama",
    config_class="LlamaConfig",
    model_class="LlamaForCausalLM",
    couplings=COUPLINGS,
    layer_prefix="model.layers.{}.",
    embedding="model.embed_tokens.weight",
    output="lm_head.weight",
    final_norm="model.norm.weight",
    biases=("attention_bias", "mlp_bias"),
    tied_default=False,
    heads_divide_hidden=True,
)
