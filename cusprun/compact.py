"""Slices the coupled tensors of a plan out of the dense checkpoint: smaller tensors, no masks, no zeros.

Tensors are read, sliced and written one after another; each keeps its stored element type.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.anatomy import Coupling, LayerWidths, read_config
from cusprun.checkpoint import Weights, expert_config, write_weights
from cusprun.dense import copy_companions
from cusprun.files import folder_written_whole, write_json
from cusprun.plan import LayerPlan, Plan
from cusprun.progress import track

if TYPE_CHECKING:
    import torch


ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def compact(
    dense: Path, plan: Plan, out: Path, *, refitted: Path | None = None, note: dict[str, Any] | None = None
) -> None:
    """Writes the model folder ``out``, whole or not at all, with only the units that ``plan`` keeps.

    Tensors that the folder ``refitted`` holds under the dense model's names are taken from there, in the dense tensor's
    element type. Biases that the plan gives the expert and neither folder holds are zero. ``note`` joins what
    config.json says under ``cusprun``. Raises Failed where a tensor is missing or not finite.
    """
    pieces = _Pieces(dense, plan, refitted)
    config = expert_config(read_config(dense), plan.expert)
    noted = {key: value for key, value in (config.get("cusprun") or {}).items() if not key.startswith("source_")}
    config["cusprun"] = {**noted, **(note or {})}  # what the dense weights came from, these weights do not
    if config["model_type"] == plan.expert.family.per_layer_name:
        config["cusprun"]["load_with"] = "import cusprun; AutoModelForCausalLM.from_pretrained(folder)"
    with folder_written_whole(out) as part:
        sizes = pieces.sizes()
        write_weights(part, track(pieces, "compacting", total=len(sizes)), sizes)
        copy_companions(dense, part)
        write_json(part / "config.json", config)


class _Pieces:
    """The expert's tensors one after another, cut out of the dense model's."""

    def __init__(self, dense: Path, plan: Plan, refitted: Path | None) -> None:
        self.weights, self.plan = Weights(dense), plan
        self.refitted = Weights(refitted) if refitted else None
        self.shapes = dict(plan.expert.tensor_shapes())
        # the expert's layers are numbered anew: tensor -> dense tensor, what is cut in it, what is kept, dense widths
        self.cuts: dict[str, tuple[str, Coupling | None, LayerPlan, LayerWidths]] = {}
        couplings = {coupling.tensor: coupling for coupling in plan.expert.family.couplings}
        for index, source in enumerate(plan.sources):
            prefix = plan.expert.prefix(index)
            for name in (name for name in self.shapes if name.startswith(prefix)):
                inner = name.removeprefix(prefix)
                original = plan.dense.prefix(source) + inner
                self.cuts[name] = original, couplings.get(inner), plan.layers[source], plan.dense.layers[source]

    def _dtype(self, name: str) -> str:
        """Element type of a dense tensor; a bias that the dense model lacks has its matrix's."""
        return self.weights.dtype(name if name in self.weights else f"{name.removesuffix('.bias')}.weight")

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, in file order."""
        found = {}
        for name, shape in self.shapes.items():
            dtype = self._dtype(self.cuts[name][0] if name in self.cuts else name)
            found[name] = prod(shape) * ELEMENT_BYTES[dtype]
        return found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in self.shapes.items():
            tensor = self._cut(*self.cuts[name], shape) if name in self.cuts else self.weights[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: sliced to {tuple(tensor.shape)}, the plan says {shape}")
            yield name, tensor

    def _cut(
        self,
        source: str,
        coupling: Coupling | None,
        kept: LayerPlan,
        before: LayerWidths,
        shape: tuple[int, ...],
    ) -> torch.Tensor:
        import torch

        dtype = getattr(torch, DTYPES[self._dtype(source)])
        if self.refitted is not None and source in self.refitted:
            return self.refitted[source].to(dtype)
        if source.endswith(".bias") and source not in self.weights:
            return torch.zeros(shape, dtype=dtype)
        tensor = self.weights[source]
        if coupling is None:
            return tensor
        index = unit_indices(kept, coupling.unit, before.queries_per_kv, self.plan.dense.head_dim)
        return tensor.index_select(coupling.axis, index)


def unit_indices(kept: LayerPlan, unit: str, queries_per_kv: int, head_dim: int) -> torch.Tensor:
    """Row or column numbers that stay for one kind of unit: channels, or each kept group's runs of head_dim."""
    import torch

    if unit == "ffn":
        return torch.tensor(kept.ffn)
    run = head_dim * (queries_per_kv if unit == "heads" else 1)
    return (torch.tensor(kept.kv_heads).unsqueeze(1) * run + torch.arange(run)).flatten()
