"""Backward passes of the whole model over calibration windows, summed to what LLM-Pruner needs of each layer.

The model, one gradient of it and two sums of that size are in memory at once; what is returned is a few numbers a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cusprun.anatomy import Anatomy, Coupling
from cusprun.checkpoint import load_model
from cusprun.errors import Failed, InvalidRequest
from cusprun.layerwise import check_window
from cusprun.moments import VARIANTS, GradientSums
from cusprun.progress import track

if TYPE_CHECKING:
    import torch


def collect_gradients(
    folder: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    *,
    most: int | None = None,
    device: str = "cpu",
) -> list[dict[str, GradientSums]]:
    """One entry a layer, from dimension to its sums. A sample is a window, its loss the mean over the window's tokens.

    ``windows`` maps each dimension to token ids, (n, window) int64; at most ``most`` of each are taken, spread evenly.
    One window at a time goes through the model, in float32. Raises InvalidRequest where there is no text or a window is
    longer than the model reads, Failed where a loss is not finite.
    """
    chosen = {name: _spread(ids, most) for name, ids in windows.items() if len(ids)}
    if not chosen:
        raise InvalidRequest("there is no text to take gradients of")
    model = load_model(folder).to(device).requires_grad_(False)
    check_window(model.config, max(ids.shape[1] for ids in chosen.values()))
    weights = _coupled_weights(model, anatomy)
    for layer in weights:
        for weight in layer.values():
            weight.requires_grad_(True)
    return [
        dict(zip(chosen, sums, strict=True))
        for sums in zip(*(_collect(model, anatomy, weights, name, ids) for name, ids in chosen.items()), strict=True)
    ]


def _spread(ids: np.ndarray, most: int | None) -> np.ndarray:
    if most is None or most >= len(ids):
        return ids
    if most < 1:
        raise InvalidRequest("gradients need one window at least")
    return ids[np.arange(most) * len(ids) // most]


def _coupled_weights(model: Any, anatomy: Anatomy) -> list[dict[Coupling, torch.Tensor]]:
    """The matrices of every layer that lose rows or columns with a unit."""
    couplings = [coupling for coupling in anatomy.family.couplings if coupling.tensor.endswith(".weight")]
    parameters = dict(model.named_parameters())
    return [
        {
            coupling: parameters[anatomy.prefix(index) + coupling.tensor]
            for coupling in couplings
            if coupling.unit == "ffn" or widths.kv_heads
        }
        for index, widths in enumerate(anatomy.layers)
    ]


def _collect(
    model: Any, anatomy: Anatomy, weights: list[dict[Coupling, torch.Tensor]], name: str, ids: np.ndarray
) -> list[GradientSums]:
    """The sums of every layer on one dimension's windows, (n, window)."""
    import torch

    flat = [weight for layer in weights for weight in layer.values()]
    first, second = ([torch.zeros_like(weight) for weight in flat] for _ in range(2))  # Σ g and Σ g² over samples
    for window in track(torch.from_numpy(ids).to(flat[0].device), f"gradients, {name}", total=len(ids)):
        loss = model(input_ids=window.unsqueeze(0), labels=window.unsqueeze(0), use_cache=False).loss
        if not torch.isfinite(loss):
            raise Failed(f"the loss is not finite on the {name} text: no gradients can be taken")
        for total, squares, gradient in zip(first, second, torch.autograd.grad(loss, flat), strict=True):
            total += gradient
            squares.addcmul_(gradient, gradient)
    sums, taken = [], iter(zip(first, second, strict=True))
    with torch.no_grad():
        for layer, widths in zip(weights, anatomy.layers, strict=True):
            units: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"ffn": [], "attention": []}
            for coupling, weight in layer.items():
                count = widths.ffn if coupling.unit == "ffn" else widths.kv_heads
                found = _sum_units(weight, *next(taken), coupling.axis, count)
                units["ffn" if coupling.unit == "ffn" else "attention"].append(found)
            (ffn, ffn_vectors), (attention, attention_vectors) = (_join(units[kind]) for kind in ("ffn", "attention"))
            sums.append(GradientSums(len(ids), ffn, attention, ffn_vectors, attention_vectors))
    return sums


def _sum_units(
    weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, axis: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one matrix whose units lie along ``axis``: VARIANTS per unit, (3, units); Σ w G per row, (units, rows)."""
    import torch

    linear = weight * first
    quadratic = weight.square() * second  # of squares: never negative
    rows = torch.stack(
        [
            values.sum(1 - axis, dtype=torch.float64).cpu()
            for values in (linear, linear.abs(), quadratic, (linear - quadratic / 2).abs())
        ]
    )
    per_unit = rows.reshape(4, count, -1)  # (signed and VARIANTS, units, rows of a unit)
    return per_unit[1:].sum(2), per_unit[0]


def _join(matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Variants summed, vectors side by side; empty where a layer has no such unit."""
    import torch

    if not matrices:
        return torch.zeros(len(VARIANTS), 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    variants, vectors = zip(*matrices, strict=True)
    return torch.stack(variants).sum(0), torch.cat(vectors, dim=1)
