"""The words of anatomy: a family's couplings, and one model's sizes with the counts that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cusprun.errors import InvalidRequest

Unit = Literal["ffn", "heads", "kv_heads"]

MIN_FFN = 32  # a layer without channels loses its attention as well in llama.cpp's per-layer architecture
MIN_KV_HEADS = 1


@dataclass(frozen=True)
class Coupling:
    """One tensor of a decoder layer that must be sliced when units go.

    ``tensor`` is its name below the layer's prefix, ``unit`` what lies along ``axis``: FFN channels one by one,
    heads and kv heads in runs of head_dim.
    """

    tensor: str
    unit: Unit
    axis: int


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends: what its widths do not say."""

    rotates: bool = True  # q and k carry a rotary embedding
    window: int | None = None  # tokens that a query sees, its own included; None for all before it
    theta: float | None = None  # base of the rotary embedding where the layer has one of its own


def plain_attention(config: dict[str, Any], layers: int, folder: str) -> tuple[LayerAttention, ...]:
    """Every layer rotates and sees all that came before."""
    return (LayerAttention(),) * layers


def no_settings(attention: Sequence[LayerAttention]) -> dict[str, Any]:
    """Nothing in config.json tells the layers' attention apart."""
    return {}


def no_scaling(config: dict[str, Any], folder: str) -> dict[str, float | None]:
    """Scores are scaled by head_dim^-½, and nothing is capped."""
    return {}


def read_positive(config: dict[str, Any], key: str, default: float | None, folder: str) -> float | None:
    """A number above 0 of a config.json, ``default`` where the key is not there; null is None.

    Raises InvalidRequest for anything else.
    """
    value = config.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidRequest(f"{folder}/config.json: {key} must be a number above 0, not {value!r}")
    return float(value)


@dataclass(frozen=True)
class Family:
    """What differs between model families."""

    name: str  # model_type of stock transformers
    per_layer_name: str  # model_type of the per-layer form, which needs `import cusprun`
    config_class: str
    model_class: str
    couplings: tuple[Coupling, ...]
    layer_prefix: str
    embedding: str
    output: str
    final_norm: str
    biases: tuple[str, ...]  # of attention_bias and mlp_bias, those that the stock config has
    tied_default: bool
    heads_divide_hidden: bool  # stock config refuses head counts that do not divide the hidden size
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the FFN's gate
    activation_field: str = "hidden_act"  # of config.json
    theta: float = 10000.0  # base of the rotary embedding where config.json names none
    qk_norms: bool = False  # each head of q and of k is normed before it rotates, with weights (head_dim,)
    ffn_norm: str = "post_attention_layernorm"  # before the FFN; input_layernorm is before the attention
    attention_norm_behind: str | None = None  # of what the attention adds to the residual stream
    ffn_norm_behind: str | None = None  # of what the FFN adds
    norm_offset: float = 0.0  # that every norm adds to its weights
    scales_embedding: bool = False  # the embedding is multiplied by the root of the hidden size
    attention_goes: bool = True  # layers without an attention block are computed
    # config, count of layers and the folder's name to the attention of every layer; refuses variants by InvalidRequest
    attention: Callable[[dict[str, Any], int, str], tuple[LayerAttention, ...]] = plain_attention
    attention_settings: Callable[[Sequence[LayerAttention]], dict[str, Any]] = no_settings  # the way back
    # config and the folder's name to query_scale, attention_softcap and output_softcap of the anatomy
    scaling: Callable[[dict[str, Any], str], dict[str, float | None]] = no_scaling

    @property
    def module(self) -> str:
        """Name of the family's module in transformers."""
        return self.name.removesuffix("_text")


@dataclass(frozen=True)
class LayerWidths:
    """Units of one decoder layer: FFN channels, query heads, kv heads.

    Without heads the layer has no attention block, and so no input_layernorm either.
    """

    ffn: int
    heads: int
    kv_heads: int

    @property
    def queries_per_kv(self) -> int:
        """Query heads on each kv head, 0 where the layer has no attention."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    def possible(self, *, first: bool) -> bool:
        """Whether the runtimes compute such a layer: with an FFN, and with attention in whole groups or none at all.

        The first layer of a model needs attention: torch and llama.cpp read from its cache how much text there was.
        """
        if self.heads == self.kv_heads == 0:
            return self.ffn >= 1 and not first
        return min(self.ffn, self.heads, self.kv_heads) >= 1 and self.heads % self.kv_heads == 0


@dataclass(frozen=True)
class Anatomy:
    """One model's sizes."""

    family: Family
    hidden_size: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerWidths, ...]
    tied: bool
    attention_bias: bool  # q, k, v and o have biases, in every layer
    mlp_bias: bool  # gate, up and down have
    attention: tuple[LayerAttention, ...] = ()  # of every layer; plain where none is given
    norm_eps: float = 1e-6
    query_scale: float | None = None  # of q before k reads it; head_dim^-½ where it is None
    attention_softcap: float | None = None  # c tanh(s / c) of the attention's scores
    output_softcap: float | None = None  # of the logits

    def __post_init__(self) -> None:
        if not self.attention:
            object.__setattr__(self, "attention", (LayerAttention(),) * len(self.layers))

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same widths, so that stock transformers can hold the model."""
        return len(set(self.layers)) == 1

    def prefix(self, layer: int) -> str:
        return self.family.layer_prefix.format(layer)

    def with_layers(self, layers: Sequence[LayerWidths | None]) -> Anatomy:
        """The same with other widths in each layer, and without those that are None."""
        stay = [
            (widths, attention) for widths, attention in zip(layers, self.attention, strict=True) if widths is not None
        ]
        return replace(self, layers=tuple(w for w, _ in stay), attention=tuple(a for _, a in stay))

    def with_vocabulary(self, rows: int) -> Anatomy:
        return replace(self, vocab_size=rows)

    def ffn_unit_parameters(self) -> int:
        """Parameters that go with one FFN channel: a row of gate and up, a column of down, the biases of the rows."""
        return 3 * self.hidden_size + (2 if self.mlp_bias else 0)

    def head_unit_parameters(self, queries_per_kv: int) -> int:
        """Parameters that go with one kv group: rows of q, k and v, columns of o, the biases of the rows."""
        rows = (queries_per_kv + 2) * self.head_dim
        return (
            rows * self.hidden_size
            + queries_per_kv * self.head_dim * self.hidden_size
            + (rows if self.attention_bias else 0)
        )

    def layer_matrices(self, widths: LayerWidths) -> int:
        """Weights of one layer's linear maps, each multiplied once per token."""
        attention = 2 * (widths.heads + widths.kv_heads) * self.head_dim * self.hidden_size
        return attention + 3 * widths.ffn * self.hidden_size

    def attention_parameters(self, widths: LayerWidths) -> int:
        """Parameters of a layer's attention block: what goes when it is removed whole, its norms included."""
        if widths.heads == 0:
            return 0
        matrices = 2 * (widths.heads + widths.kv_heads) * self.head_dim * self.hidden_size
        rows = (widths.heads + 2 * widths.kv_heads) * self.head_dim + self.hidden_size
        norms = self.hidden_size * (2 if self.family.attention_norm_behind else 1)
        norms += 2 * self.head_dim if self.family.qk_norms else 0
        return matrices + (rows if self.attention_bias else 0) + norms

    def ffn_parameters(self, widths: LayerWidths) -> int:
        """Parameters of a layer's FFN with its norms; 0 for a layer that is not there."""
        if widths.ffn == 0:
            return 0
        rows = 2 * widths.ffn + self.hidden_size
        norms = self.hidden_size * (2 if self.family.ffn_norm_behind else 1)
        return 3 * widths.ffn * self.hidden_size + (rows if self.mlp_bias else 0) + norms

    def layer_parameters(self, widths: LayerWidths) -> int:
        return self.attention_parameters(widths) + self.ffn_parameters(widths)

    @property
    def parameters(self) -> int:
        """All parameters, embeddings counted once where they are tied."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + sum(map(self.layer_parameters, self.layers)) + self.hidden_size

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of the linear maps and the output head for one token; attention over the cache not."""
        return sum(map(self.layer_matrices, self.layers)) + self.vocab_size * self.hidden_size

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that a checkpoint of this anatomy holds, with its shape, in file order."""
        hidden, dim = self.hidden_size, self.head_dim
        yield self.family.embedding, (self.vocab_size, hidden)
        for index, widths in enumerate(self.layers):
            prefix = self.prefix(index)
            q, kv = widths.heads * dim, widths.kv_heads * dim
            attention = (
                ("self_attn.q_proj", q, hidden, self.attention_bias),
                ("self_attn.k_proj", kv, hidden, self.attention_bias),
                ("self_attn.v_proj", kv, hidden, self.attention_bias),
                ("self_attn.o_proj", hidden, q, self.attention_bias),
            )
            ffn = (
                ("mlp.gate_proj", widths.ffn, hidden, self.mlp_bias),
                ("mlp.up_proj", widths.ffn, hidden, self.mlp_bias),
                ("mlp.down_proj", hidden, widths.ffn, self.mlp_bias),
            )
            if widths.heads:
                yield f"{prefix}input_layernorm.weight", (hidden,)
            if widths.heads and self.family.qk_norms:
                yield f"{prefix}self_attn.q_norm.weight", (dim,)
                yield f"{prefix}self_attn.k_norm.weight", (dim,)
            behind = (self.family.attention_norm_behind if widths.heads else None, self.family.ffn_norm_behind)
            for norm in (self.family.ffn_norm, *filter(None, behind)):
                yield f"{prefix}{norm}.weight", (hidden,)
            for name, rows, columns, bias in (*(attention if widths.heads else ()), *ffn):
                yield f"{prefix}{name}.weight", (rows, columns)
                if bias:
                    yield f"{prefix}{name}.bias", (rows,)
        yield self.family.final_norm, (hidden,)
        if not self.tied:
            yield self.family.output, (self.vocab_size, hidden)
