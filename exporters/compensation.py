"""Rounding whose errors are made up for by the weights that are not rounded yet.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) with the second moments of each matrix's inputs, taken on
calibration text behind the layers that are rounded already. Scales are chosen for all blocks beforehand, weighed by
the moments, then the columns are rounded in the order of their inputs' moments, the largest first: a few inputs that
move together and dwarf the rest would else leave the last of them everybody's errors. Blocks are the runtimes' own
(exporters/grids.py); each matrix is rounded to the type that the file will have it in, and those in other types are
left to the runtime's own quantizer.

Two things differ from the paper. A few tokens have inputs many times as large as all others' (the first of a text),
and their moments would leave the rest no say: a token counts with at most CAP times the median norm. The ridge is a
share of each input's own moment, not of the mean: inputs differ by orders of magnitude, and the mean is that of the
largest. docs/decisions/012 has what was tried.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cusprun.anatomy import describe
from cusprun.errors import Failed
from cusprun.exporters.grids import Grid, Rounded, fit_scales, nearest
from cusprun.files import aside, folder_written_whole
from cusprun.layerwise import LayerwiseModel
from cusprun.progress import track
from cusprun.tensor_file import TensorFile

RIDGE = 0.3  # of each input's own moment
CAP = 3.0  # medians of the tokens' norms
AT_ONCE = 128  # columns whose errors go to those behind in one product
READ_TOGETHER = {  # matrices that read the same inputs
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


def round_compensated(weight: torch.Tensor, moments: torch.Tensor, grid: Grid) -> Rounded:
    """Rounds ``weight``, (outputs, inputs), column by column; what is left over goes to the columns behind.

    ``moments`` is E[x xᵀ] of its inputs, (inputs, inputs). Inputs that never move leave their columns as rounding alone
    makes them. Raises Failed where the moments are not finite.
    """
    outputs, inputs = weight.shape
    wide = weight.float()
    scales, minima = fit_scales(wide.unflatten(1, (-1, grid.block)), _importance(wide, moments, grid), grid)
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = find_factor(moments[order][:, order])
    left, codes = wide[:, order], torch.empty(outputs, inputs, dtype=torch.uint8)
    for start in range(0, inputs, AT_ONCE):
        stop = min(start + AT_ONCE, inputs)
        part, errors = left[:, start:stop].clone(), torch.empty(outputs, stop - start)
        for place in range(stop - start):
            column = int(order[start + place])
            block, row = column // grid.block, factor[start + place]
            code, value = nearest(part[:, place], scales[:, block], minima[:, block], grid)
            codes[:, column] = code
            errors[:, place] = (part[:, place] - value) / row[start + place]
            part[:, place + 1 :] -= torch.outer(errors[:, place], row[start + place + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return Rounded(codes, scales, minima)


def _importance(weight: torch.Tensor, moments: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What an error in each weight counts where scales are chosen, (outputs, blocks, block): llama.cpp's own choice.

    That is the input's moment, and more for large weights, of which there are few.
    """
    typical = weight.square().mean(1, keepdim=True)
    found: torch.Tensor = moments.diagonal().float().clamp(min=1e-30) * (typical + weight.square()).sqrt()
    return found.unflatten(1, (-1, grid.block))


def find_factor(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moments' inverse, (inputs, inputs) float32.

    Inputs are brought to one size before and back after: theirs differ by more than float64 has digits for.
    """
    curvature = moments.double().cpu()
    if not torch.isfinite(curvature).all():
        raise Failed("the moments of a matrix's inputs are not finite")
    diagonal = curvature.diagonal()
    largest = float(diagonal.max())
    size = diagonal.clamp(min=1e-12 * largest if largest > 0 else 1.0).sqrt()  # where nothing moves, all count alike
    level = curvature / torch.outer(size, size)
    level.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(level))
    return (torch.linalg.cholesky(inverse, upper=True) / size).float()


@torch.no_grad()
def compensate_model(
    model_dir: Path, windows: Mapping[str, np.ndarray], grids: Mapping[str, Grid], store: Path, device: str = "cpu"
) -> None:
    """Rounds matrices of the layers one layer after the other on windows of token ids, (n, window) a text.

    ``grids`` has the tensors to round. Each layer's moments are taken behind the rounded layers before it. ``store``
    keeps what comes of it and is read by :class:`Compensated`. Raises InvalidRequest where there is no text or a window
    is longer than the model reads.
    """
    from safetensors.torch import save_file

    anatomy = describe(model_dir)
    model = LayerwiseModel(model_dir, anatomy, device, fast=True)
    batches = model.embed_texts(windows)
    with folder_written_whole(store) as folder:
        for index in track(range(len(anatomy.layers)), "compensated rounding, layer by layer"):
            with model.layer(index) as layer:
                prefix = anatomy.prefix(index)
                wanted = {
                    name: grids[tensor]
                    for name, _ in layer.named_modules()
                    if (tensor := f"{prefix}{name}.weight") in grids
                }
                found = _round_layer(model, layer, batches, wanted)
                save_file(
                    {
                        f"{prefix}{name}.weight/{part}": getattr(rounded, part).contiguous()
                        for name, rounded in found.items()
                        for part in ("codes", "scales", "minima")
                    },
                    folder / f"{index:05d}.safetensors",
                )
                for name, rounded in found.items():
                    layer.get_submodule(name).weight.copy_(rounded.weights(wanted[name]))
                batches = [model.forward(layer, batch.to(device)).cpu() for batch in batches]


def _round_layer(
    model: LayerwiseModel, layer: Any, batches: list[torch.Tensor], grids: Mapping[str, Grid]
) -> dict[str, Rounded]:
    """Some matrices of one layer, rounded with the moments of what they read in ``batches``."""
    reading = {name: READ_TOGETHER.get(name, name) for name in grids}
    moments, handles = {}, []
    for name in set(reading.values()):
        module = layer.get_submodule(name)
        total = moments[name] = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)

        def add(_: Any, inputs: tuple[torch.Tensor], __: Any, total: torch.Tensor = total) -> None:
            rows = capped(inputs[0].flatten(0, -2).float())
            total += (rows.T @ rows).double().cpu()

        handles.append(module.register_forward_hook(add))
    for batch in batches:
        model.forward(layer, batch.to(model.device))
    for handle in handles:
        handle.remove()
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in batches)
    return {
        name: round_compensated(layer.get_submodule(name).weight.detach().cpu(), moments[reading[name]] / tokens, grid)
        for name, grid in grids.items()
    }


def capped(rows: torch.Tensor) -> torch.Tensor:
    """Inputs of a matrix, (tokens, inputs), those whose norm is over CAP medians brought down to it."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows * (CAP * norms.median() / norms.clamp(min=1e-30)).clamp(max=1.0)


class Compensable(Protocol):
    """An export that says which of its matrices can be rounded with compensation, and on which grids."""

    @property
    def grids(self) -> dict[str, Grid]: ...


class Roundings:
    """A model folder rounded with compensation, once for each choice of grids.

    ``windows`` are token ids, (n, window) a text, or what gives them when they are first needed; what comes of it lies
    in a folder below ``scratch`` and goes with the object.
    """

    def __init__(
        self, model_dir: Path, windows: Callable[[], Mapping[str, np.ndarray]], scratch: Path, device: str = "cpu"
    ) -> None:
        self._model_dir, self._windows, self._device = model_dir, windows, device
        self._parent = scratch
        self._folder: Path | None = None
        self._done: dict[tuple[tuple[str, Grid], ...], Path] = {}

    def for_export(self, rounding: str, export: Compensable) -> Compensated | None:
        """What an export takes as it is; None where it is rounded otherwise, or has nothing to round so."""
        return self.of(export.grids) if rounding == "gptq" and export.grids else None

    def of(self, grids: Mapping[str, Grid]) -> Compensated:
        """These matrices on these grids, by tensor."""
        key = tuple(sorted(grids.items(), key=lambda entry: entry[0]))
        if key not in self._done:
            if self._folder is None:
                self._folder = aside(self._parent / "compensated")
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            store = self._folder / str(len(self._done))
            compensate_model(self._model_dir, self._windows(), grids, store, self._device)
            self._done[key] = store
        return Compensated(self._done[key])


class Compensated:
    """What :func:`compensate_model` left in a folder; matrices are read when they are asked for."""

    def __init__(self, store: Path) -> None:
        files = map(TensorFile, sorted(store.glob("*.safetensors")))
        self._files = {name: file for file in files for name in file}

    def __contains__(self, tensor: str) -> bool:
        return f"{tensor}/codes" in self._files

    def __getitem__(self, tensor: str) -> Rounded:
        return Rounded(*(self._files[f"{tensor}/{part}"][f"{tensor}/{part}"] for part in ("codes", "scales", "minima")))
