"""Slices the coupled tensors of a plan out of the dense checkpoint: smaller tensors, no masks, no zeros.

Tensors are read, sliced and written one after another; each keeps its stored element type.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.anatomy import read_config
from cusprun.checkpoint import Weights, expert_config, write_weights
from cusprun.dense import copy_companions
from cusprun.files import folder_written_whole, write_json
from cusprun.plan import LayerPlan, Plan
from cusprun.progress import track

if TYPE_CHECKING:
    import torch


def compact(
    dense: Path, plan: Plan, out: Path, *, refitted: Path | None = None, note: dict[str, Any] | None = None
) -> None:
    """Writes the model folder ``out``, whole or not at all, with only the units that ``plan`` keeps.

    Tensors that the folder ``refitted`` holds are taken from there, in the dense tensor's element type.
    ``note`` joins what config.json says under ``cusprun``. Raises Failed where a tensor is missing or not finite.
    """
    weights = Weights(dense)
    shapes = dict(plan.expert.tensor_shapes())
    config = expert_config(read_config(dense), plan.expert)
    noted = {key: value for key, value in (config.get("cusprun") or {}).items() if not key.startswith("source_")}
    config["cusprun"] = {**noted, **(note or {})}  # what the dense weights came from, these weights do not
    if config["model_type"] == plan.expert.family.per_layer_name:
        config["cusprun"]["load_with"] = "import cusprun; AutoModelForCausalLM.from_pretrained(folder)"
    with folder_written_whole(out) as part:
        sizes = {name: _bytes(shape, weights.dtype(name)) for name, shape in shapes.items()}
        write_weights(
            part,
            track(
                _sliced(weights, plan, shapes, Weights(refitted) if refitted else None), "compacting", total=len(shapes)
            ),
            sizes,
        )
        copy_companions(dense, part)
        write_json(part / "config.json", config)


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[dtype]
    for side in shape:
        size *= side
    return size


def _sliced(
    weights: Weights, plan: Plan, shapes: dict[str, tuple[int, ...]], refitted: Weights | None
) -> Iterator[tuple[str, torch.Tensor]]:
    family = plan.expert.family
    by_name = {
        plan.expert.prefix(index) + coupling.tensor: (coupling, kept, plan.dense.layers[index])
        for index, kept in enumerate(plan.layers)
        for coupling in family.couplings
    }
    for name, shape in shapes.items():
        tensor = weights[name]
        if refitted is not None and name in refitted:
            tensor = refitted[name].to(tensor.dtype)
        elif name in by_name:
            coupling, kept, before = by_name[name]
            index = unit_indices(kept, coupling.unit, before.heads // before.kv_heads, plan.dense.head_dim)
            tensor = tensor.index_select(coupling.axis, index)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: sliced to {tuple(tensor.shape)}, the plan says {shape}")
        yield name, tensor


def unit_indices(kept: LayerPlan, unit: str, queries_per_kv: int, head_dim: int) -> torch.Tensor:
    """Row or column numbers that stay for one kind of unit: channels, or each kept group's runs of head_dim."""
    import torch

    if unit == "ffn":
        return torch.tensor(kept.ffn)
    run = head_dim * (queries_per_kv if unit == "heads" else 1)
    return (torch.tensor(kept.kv_heads).unsqueeze(1) * run + torch.arange(run)).flatten()
