"""Rounding whose errors are made up for by the weights that are not rounded yet.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) with the second moments of each matrix's inputs, taken on
calibration text behind the layers that are rounded already. Scales are those of the runtimes' own blocks: llama.cpp's
q8_0, q4_0, q4_1 and iq4_nl, and MatMulNBits' int4. Only o, gate, up and down are compensated: what k and v give is read
in proportion to the attention each token gets, and with plain moments of their inputs they come out worse than rounded
to the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cusprun.anatomy import describe
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import folder_written_whole
from cusprun.layerwise import LayerwiseModel, check_window
from cusprun.progress import track
from cusprun.tensor_file import TensorFile

BATCH_TOKENS = 2048
RIDGE = 0.01  # of the mean diagonal, GPTQ's own
MOST_RIDGES = 4  # tried, each ten times the one before
MATRICES = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TRIALS = tuple(0.02 * step for step in range(35, 56))  # of the scale that reaches a block's largest weight
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """What a block of weights may become: scale * level + minimum, a scale and, with ``shifted``, a minimum a block."""

    levels: tuple[int, ...]  # ascending
    block: int = 32
    shifted: bool = False
    half: bool = True  # scales are kept in float16


GRIDS = {
    "q8_0": Grid(tuple(range(-127, 128))),
    "q4_0": Grid(tuple(range(-8, 8))),
    "q4_1": Grid(tuple(range(16)), shifted=True),
    "iq4_nl": Grid(IQ4_NL),
    "int4": Grid(tuple(range(-8, 8)), half=False),
}


@dataclass(frozen=True)
class Rounded:
    """A matrix on its grid."""

    codes: torch.Tensor  # (outputs, inputs) uint8, the level's number
    scales: torch.Tensor  # (outputs, blocks) float32
    minima: torch.Tensor  # the same; zeros where the grid has none

    def weights(self, grid: Grid) -> torch.Tensor:
        """The matrix that this stands for, (outputs, inputs) float32."""
        levels = torch.tensor(grid.levels, dtype=torch.float32)
        blocks = levels[self.codes.long()].unflatten(1, (-1, grid.block))
        return (blocks * self.scales[..., None] + self.minima[..., None]).flatten(1)


def round_compensated(weight: torch.Tensor, moments: torch.Tensor, grid: Grid) -> Rounded:
    """Rounds ``weight``, (outputs, inputs), column by column; what is left over goes to the columns behind.

    ``moments`` is E[x xᵀ] of its inputs, (inputs, inputs). Inputs that never move leave their columns as rounding alone
    makes them. Raises Failed where the moments are not finite.
    """
    inputs = weight.shape[1]
    curvature = moments.double().clone()
    if not torch.isfinite(curvature).all():
        raise Failed("the moments of a matrix's inputs are not finite")
    diagonal = curvature.diagonal()
    ridge = float(RIDGE * diagonal.mean()) or 1.0  # where nothing moves, every column counts alike
    for _ in range(MOST_RIDGES):
        diagonal += ridge
        lower, failed = torch.linalg.cholesky_ex(curvature)
        if not failed:
            break
        ridge *= 10
    else:
        raise Failed("the moments of a matrix's inputs cannot be inverted")
    inverse = torch.cholesky_inverse(lower)
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float().clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, minima = torch.empty(2, weight.shape[0], inputs // grid.block)
    for number, start in enumerate(range(0, inputs, grid.block)):
        stop = start + grid.block
        block = left[:, start:stop].clone()
        steps = factor.diagonal()[start:stop]
        scale, minimum = fit_scales(block, steps.square().reciprocal(), grid)
        scales[:, number], minima[:, number] = scale, minimum
        errors = torch.empty_like(block)
        for place in range(grid.block):
            code, value = nearest(block[:, place], scale, minimum, grid)
            codes[:, start + place] = code
            errors[:, place] = (block[:, place] - value) / steps[place]
            block[:, place + 1 :] -= torch.outer(errors[:, place], factor[start + place, start + place + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return Rounded(codes, scales, minima)


def fit_scales(block: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each row of ``block``, (outputs, width), least in squares weighed by ``importance``."""
    minimum = block.amin(1) if grid.shifted else torch.zeros(len(block))
    if grid.shifted:
        minimum = _kept(minimum, grid)
        widest = (block.amax(1) - minimum) / grid.levels[-1]
    else:
        place = block.abs().argmax(1, keepdim=True)
        widest = block.gather(1, place).squeeze(1) / grid.levels[0]
    best, least = _kept(widest, grid), torch.full((len(block),), torch.inf)
    for trial in TRIALS:
        scale = _kept(widest * trial, grid)
        _, values = nearest(block, scale[:, None], minimum[:, None], grid)
        loss = ((block - values).square() * importance).sum(1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best, minimum


def nearest(
    weights: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the nearest levels, uint8, and what they stand for; a scale of 0 gives the level nearest 0."""
    levels = torch.tensor(grid.levels, dtype=torch.float32)
    wanted = torch.where(scale == 0, torch.zeros(()), (weights - minimum) / torch.where(scale == 0, 1.0, scale))
    codes = torch.bucketize(wanted.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), levels[codes] * scale + minimum


def _kept(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    return values.half().float() if grid.half else values


@torch.no_grad()
def compensate_model(
    model_dir: Path, windows: Mapping[str, np.ndarray], quant: str, store: Path, device: str = "cpu"
) -> None:
    """Rounds the model's matrices layer by layer on windows of token ids, (n, window) a text; ``store`` keeps them.

    Each layer's moments are taken behind the rounded layers before it. Matrices whose rows do not divide into blocks
    are left out. Raises InvalidRequest where there is no text or a window is longer than the model reads.
    """
    from safetensors.torch import save_file

    grid, anatomy = GRIDS[quant], describe(model_dir)
    model = LayerwiseModel(model_dir, anatomy, device, fast=True)
    if not any(ids.size for ids in windows.values()):
        raise InvalidRequest("compensated rounding needs calibration text")
    check_window(model.config, max(ids.shape[1] for ids in windows.values()))
    batches = [
        part
        for ids in windows.values()
        for part in model.embed(ids).split(max(1, BATCH_TOKENS // ids.shape[1]))
        if len(part)
    ]
    with folder_written_whole(store) as folder:
        for index in track(range(len(anatomy.layers)), f"compensated rounding to {quant}, layer by layer"):
            with model.layer(index) as layer:
                found = _round_layer(model, layer, batches, grid)
                save_file(
                    {
                        f"{anatomy.prefix(index)}{name}.weight/{part}": getattr(rounded, part).contiguous()
                        for name, rounded in found.items()
                        for part in ("codes", "scales", "minima")
                    },
                    folder / f"{index:05d}.safetensors",
                )
                for name, rounded in found.items():
                    layer.get_submodule(name).weight.copy_(rounded.weights(grid))
                batches = [model.forward(layer, batch.to(device)) for batch in batches]


def _round_layer(model: LayerwiseModel, layer: Any, batches: list[torch.Tensor], grid: Grid) -> dict[str, Rounded]:
    """One layer's matrices, rounded with the moments of what they read in ``batches``."""
    there = {name: module for name, module in layer.named_modules() if name in MATRICES}
    there = {name: module for name, module in there.items() if module.in_features % grid.block == 0}
    reading = {name: name for name in there}
    if "mlp.up_proj" in reading:
        reading["mlp.up_proj"] = "mlp.gate_proj"  # they read the same
    sums = {
        name: torch.zeros(there[name].in_features, there[name].in_features, dtype=torch.float64)
        for name in set(reading.values())
    }
    handles = []
    for name, total in sums.items():

        def add(_: Any, inputs: tuple[torch.Tensor], __: Any, total: torch.Tensor = total) -> None:
            rows = inputs[0].flatten(0, -2).double().cpu()  # one token's activations may dwarf all others'
            total += rows.T @ rows

        handles.append(there[name].register_forward_hook(add))
    tokens = 0
    for batch in batches:
        model.forward(layer, batch.to(model.device))
        tokens += batch.shape[0] * batch.shape[1]
    for handle in handles:
        handle.remove()
    return {
        name: round_compensated(module.weight.detach().cpu(), sums[reading[name]] / tokens, grid)
        for name, module in there.items()
    }


class Compensated:
    """What :func:`compensate_model` left in a folder; matrices are read when they are asked for."""

    def __init__(self, store: Path) -> None:
        files = map(TensorFile, sorted(store.glob("*.safetensors")))
        self._files = {name: file for file in files for name in file}

    def __contains__(self, tensor: str) -> bool:
        return f"{tensor}/codes" in self._files

    def __getitem__(self, tensor: str) -> Rounded:
        return Rounded(*(self._files[f"{tensor}/{part}"][f"{tensor}/{part}"] for part in ("codes", "scales", "minima")))


def gguf_blocks(rounded: Rounded, quant: str) -> np.ndarray:
    """The matrix as ggml lays its blocks out, (outputs, bytes of a row) uint8."""
    grid = GRIDS[quant]
    outputs = len(rounded.codes)
    codes = rounded.codes.numpy().reshape(outputs, -1, grid.block)
    heads = [rounded.scales.numpy(), *([rounded.minima.numpy()] if grid.shifted else [])]
    parts = [head.astype(np.float16)[..., None].view(np.uint8) for head in heads]
    if quant == "q8_0":
        parts.append((codes.astype(np.int16) + grid.levels[0]).astype(np.int8).view(np.uint8))
    else:  # a byte holds a weight of the first half of its block and one of the second
        parts.append(codes[..., : grid.block // 2] | codes[..., grid.block // 2 :] << 4)
    return np.concatenate(parts, axis=-1).reshape(outputs, -1)
