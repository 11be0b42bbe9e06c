"""The tensors of a model folder under llama.cpp's names and in its layout, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from cusprun.anatomy import Anatomy, family_of
from cusprun.checkpoint import Weights
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf_config import read_number
from cusprun.layouts import find_host

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ROPE_FREQS = "rope_freqs.weight"
PLAIN = ("F32", "F16", "BF16")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SCALINGS = {"linear": ("factor",), "llama3": LLAMA3}  # and the settings that each needs


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file to write; ``source`` is its name in the model folder, None for rope_freqs.

    The rows of the tensors called ``below`` follow those of the source.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    type: str  # F32, F16 or BF16; of what is rounded before, a type of blocks
    rotary_heads: int  # heads whose rows are put into llama.cpp's rotary order, 0 for none
    below: tuple[str, ...] = ()
    added: float = 0.0  # to every entry

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the folder that it is made of, the first on top; none where it is computed."""
        return () if self.source is None else (self.source, *self.below)

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // block * size


def plan_tensors(anatomy: Anatomy, matrix_type: str, rope_freqs: np.ndarray | None) -> list[TensorPlan]:
    """Every tensor in the order in which it is written: matrices in ``matrix_type``, vectors in F32.

    Raises InvalidRequest where no architecture of llama.cpp holds the model.
    """
    host = find_host(anatomy)
    if rope_freqs is not None and not host.rope_divisors:
        raise InvalidRequest(f"llama.cpp's {host.arch} has no rope scaling of type llama3: remove it from config.json")
    plans = {} if rope_freqs is None else {ROPE_FREQS: TensorPlan(ROPE_FREQS, None, rope_freqs.shape, "F32", 0)}
    for source, shape in anatomy.tensor_shapes():
        name, rotary_heads = gguf_name(anatomy, source)
        if above := plans.get(name):
            whole = (above.shape[0] + shape[0], *shape[1:])
            plans[name] = replace(above, shape=whole, below=(*above.below, source))
        else:
            kind = matrix_type if len(shape) == 2 else "F32"
            added = anatomy.family.norm_offset if source.endswith("norm.weight") else 0.0
            plans[name] = TensorPlan(name, source, shape, kind, rotary_heads, added=added)
    return list(plans.values())


def gguf_name(anatomy: Anatomy, source: str) -> tuple[str, int]:
    """llama.cpp's name of a tensor, and the heads whose rows change places (q and k, where pairs are neighbours).

    Where q, k and v are one matrix there, all three have its name.
    """
    host, family = find_host(anatomy), anatomy.family
    norms = {  # the same name stands before the FFN in one family and behind the attention in another
        family.ffn_norm: "ffn_norm",
        family.attention_norm_behind: "post_attention_norm",
        family.ffn_norm_behind: "post_ffw_norm",
    }
    stem, _, kind = source.rpartition(".")  # kind: weight or bias
    for layer, widths in enumerate(anatomy.layers):
        prefix = anatomy.prefix(layer)
        if source.startswith(prefix):
            inner = stem[len(prefix) :]
            if host.fused_qkv and inner in QKV:
                return f"blk.{layer}.attn_qkv.{kind}", 0
            rotary = {"self_attn.q_proj": widths.heads, "self_attn.k_proj": widths.kv_heads}.get(inner, 0)
            rotary *= host.rotary_pairs
            return f"blk.{layer}.{BLOCK_NAMES.get(inner) or norms[inner]}.{kind}", rotary
    outer = {family.embedding: "token_embd", family.final_norm: "output_norm", family.output: "output"}
    return f"{outer[source]}.{kind}", 0


def read_tensors(
    weights: Weights,
    plans: list[TensorPlan],
    rope_freqs: np.ndarray | None,
    blocks: Callable[[TensorPlan], np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Yields each planned tensor's data in its type; only one is in memory at a time.

    What is planned in a type of blocks is what ``blocks`` gives. BF16 comes as uint16. Raises Failed naming the tensor
    that is absent, not finite or beyond F16.
    """
    for plan in plans:
        if plan.source is None:
            assert rope_freqs is not None
            yield rope_freqs
            continue
        if plan.type not in PLAIN:
            assert blocks is not None
            yield blocks(plan)
            continue
        tensor = weights[plan.source]
        if plan.below:
            tensor = torch.cat([tensor, *(weights[name] for name in plan.below)])
        if plan.added:
            tensor = tensor.float() + plan.added
        if plan.rotary_heads:
            tensor = to_rotary_pairs(tensor, plan.rotary_heads)
        yield _encode(tensor, plan)


def _encode(tensor: torch.Tensor, plan: TensorPlan) -> np.ndarray:
    if plan.type == "BF16":
        bits: np.ndarray = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
        return bits
    encoded = tensor.to(torch.float16 if plan.type == "F16" else torch.float32).contiguous()
    if not torch.isfinite(encoded).all():
        raise Failed(f"tensor {plan.source} holds values beyond {plan.type}: export it as f32")
    values: np.ndarray = encoded.numpy()
    return values


def to_rotary_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of q or k from transformers' rotary halves to llama.cpp's neighbouring pairs.

    Row r of a head's first half and row r of its second half rotate together; llama.cpp wants them at 2r and 2r + 1.
    Works on weights (heads * head_dim, hidden) and biases (heads * head_dim,).
    """
    rows = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, rows // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as GGUF holds it; ``freqs`` are Llama 3's divisors of each pair's frequency."""

    theta: float
    linear_factor: float | None
    freqs: np.ndarray | None  # (head_dim / 2,) float32


def read_rope(config: dict[str, Any], head_dim: int) -> Rope:
    """Rotary settings from config.json, in the form of transformers 4 or 5.

    Raises InvalidRequest for scalings that this export does not write.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise InvalidRequest(f"config.json: rope_parameters must be a mapping, not {settings!r:.60}")
    settings = settings.get("full_attention", settings)  # of the layers that see everything, where others differ
    theta = float(read_number(settings, "rope_theta", read_number(config, "rope_theta", family_of(config).theta)))
    rotated = read_number(config, "partial_rotary_factor", 1.0)
    if read_number(settings, "partial_rotary_factor", rotated) != 1.0:
        raise InvalidRequest("config.json has a partial_rotary_factor: llama.cpp's llama rotates whole heads only")
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    if kind == "default":
        return Rope(theta, None, None)
    if missing := [key for key in SCALINGS.get(kind, ()) if settings.get(key) is None]:
        raise InvalidRequest(f"config.json has rope scaling {kind!r} without {missing[0]!r}")
    if kind == "linear":
        return Rope(theta, float(read_number(settings, "factor")), None)
    if kind == "llama3":
        return Rope(theta, None, _llama3_divisors(settings, theta, head_dim))
    raise InvalidRequest(f"rope scaling {kind!r} is not exported to GGUF; default, linear and llama3 are")


def _llama3_divisors(settings: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Divisor of each pair's frequency, as transformers' ``_compute_llama3_parameters`` scales them."""
    factor, low, high, context = (read_number(settings, key) for key in LLAMA3)
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = 1.0 / ((1.0 - smooth) / factor + smooth)
    divisors = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return divisors.astype(np.float32)
