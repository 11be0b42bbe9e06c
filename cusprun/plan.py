"""A plan: the units that every layer keeps, and the anatomy that results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.structure import MIN_FFN
from cusprun.errors import InvalidRequest


@dataclass(frozen=True)
class LayerPlan:
    """Indices that one layer keeps, ascending.

    Without kv heads its attention block is gone (and its input_layernorm); without channels too the whole layer is.
    """

    ffn: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def dropped(self) -> bool:
        """Whether the whole layer goes."""
        return not self.ffn and not self.kv_heads


@dataclass(frozen=True)
class Plan:
    """What every layer keeps, and the anatomy that results.

    ``layers`` has one entry per layer of ``dense``; ``expert`` holds only the layers that stay.
    """

    layers: tuple[LayerPlan, ...]
    dense: Anatomy
    expert: Anatomy

    @property
    def sources(self) -> tuple[int, ...]:
        """For every layer of the expert, the number of the dense layer that it comes from."""
        return tuple(index for index, kept in enumerate(self.layers) if not kept.dropped)

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        """What every dense layer keeps; all zero where the whole layer goes."""
        found = [LayerWidths(0, 0, 0)] * len(self.layers)
        for source, widths in zip(self.sources, self.expert.layers, strict=True):
            found[source] = widths
        return tuple(found)

    @property
    def removed_share(self) -> float:
        """Share of all the dense model's parameters that goes, embeddings counted in the whole."""
        return 1 - self.expert.parameters / self.dense.parameters

    def counts(self) -> list[dict[str, Any]]:
        """Per dense layer, how many units of each kind there were and how many stay."""
        return [
            {
                "layer": index,
                "ffn_dense": before.ffn,
                "ffn_expert": after.ffn,
                "kv_heads_dense": before.kv_heads,
                "kv_heads_expert": after.kv_heads,
                "heads_dense": before.heads,
                "heads_expert": after.heads,
            }
            for index, (before, after) in enumerate(zip(self.dense.layers, self.widths, strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [{"ffn": list(layer.ffn), "kv_heads": list(layer.kv_heads)} for layer in self.layers],
            "attention_bias": self.expert.attention_bias,
            "mlp_bias": self.expert.mlp_bias,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], dense: Anatomy) -> Plan:
        layers = tuple(LayerPlan(tuple(layer["ffn"]), tuple(layer["kv_heads"])) for layer in value["layers"])
        biases = {name: bool(value.get(name, False)) for name in ("attention_bias", "mlp_bias")}
        return make_plan(dense, layers, **biases)


def make_plan(
    dense: Anatomy, layers: tuple[LayerPlan, ...], *, attention_bias: bool = False, mlp_bias: bool = False
) -> Plan:
    """The plan that keeps ``layers``, one entry per dense layer.

    ``attention_bias`` and ``mlp_bias`` give the expert biases that the dense model lacks; those it has stay.
    Raises InvalidRequest naming the layer where the result is one that the runtimes do not compute.
    """
    widths: list[LayerWidths | None] = []
    for index, (kept, before) in enumerate(zip(layers, dense.layers, strict=True)):
        if kept.dropped:
            widths.append(None)
            continue
        after = LayerWidths(len(kept.ffn), len(kept.kv_heads) * before.queries_per_kv, len(kept.kv_heads))
        possible = after.possible(first=not any(widths)) and (after.heads or dense.family.attention_goes)
        if after.ffn < min(MIN_FFN, before.ffn) or not possible:
            raise InvalidRequest(
                f"the plan leaves layer {index} with {after.ffn} channels and {after.kv_heads} kv heads: a layer keeps "
                f"{MIN_FFN} channels or goes whole, and the first layer that stays keeps attention"
                + ("" if dense.family.attention_goes else f", in {dense.family.name} every one")
            )
        widths.append(after)
    if not any(widths):
        raise InvalidRequest("the plan leaves no layer: remove less")
    expert = replace(
        dense.with_layers(widths),
        attention_bias=dense.attention_bias or attention_bias,
        mlp_bias=dense.mlp_bias or mlp_bias,
    )
    return Plan(layers, dense, expert)
