"""A plan: the units that every layer keeps, and the anatomy that results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cusprun.anatomy import Anatomy, LayerWidths


@dataclass(frozen=True)
class LayerPlan:
    """Indices that one layer keeps, ascending."""

    ffn: tuple[int, ...]
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What every layer keeps, and the anatomy that results."""

    layers: tuple[LayerPlan, ...]
    dense: Anatomy
    expert: Anatomy

    @property
    def removed_share(self) -> float:
        """Share of all the dense model's parameters that goes, embeddings counted in the whole."""
        return 1 - self.expert.parameters / self.dense.parameters

    def counts(self) -> list[dict[str, Any]]:
        """Per layer, how many units of each kind there were and how many stay."""
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
            for index, (before, after) in enumerate(zip(self.dense.layers, self.expert.layers, strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        return {"layers": [{"ffn": list(layer.ffn), "kv_heads": list(layer.kv_heads)} for layer in self.layers]}

    @classmethod
    def from_json(cls, value: dict[str, Any], dense: Anatomy) -> Plan:
        layers = tuple(LayerPlan(tuple(layer["ffn"]), tuple(layer["kv_heads"])) for layer in value["layers"])
        return make_plan(dense, layers)


def make_plan(dense: Anatomy, layers: tuple[LayerPlan, ...]) -> Plan:
    widths = tuple(
        LayerWidths(len(kept.ffn), len(kept.kv_heads) * (before.heads // before.kv_heads), len(kept.kv_heads))
        for kept, before in zip(layers, dense.layers, strict=True)
    )
    return Plan(layers, dense, dense.with_layers(widths))
