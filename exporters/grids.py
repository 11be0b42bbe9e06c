"""What weights may become in the runtimes' own blocks: levels, a scale for each block, and how they lie in a file.

llama.cpp's q8_0, q5_1, q5_0, q4_k, q4_1, q4_0 and iq4_nl (ggml-quants), and MatMulNBits' symmetric int4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

TRIALS = tuple(0.04 * step for step in range(18, 29))  # of the scale that reaches a block's largest weight
SIX_BITS = 63
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """What a block of weights may become: scale * level + minimum, a scale and, with ``shifted``, a minimum a block.

    Both are kept in float16; where ``together`` blocks make one larger block, as six-bit multiples of two float16 that
    the large block has, and minima are never above 0.
    """

    levels: tuple[int, ...]  # ascending
    block: int = 32
    shifted: bool = False
    together: int = 1

    @property
    def even(self) -> bool:
        """Whether the levels are all whole numbers from the first to the last."""
        return len(self.levels) == self.levels[-1] - self.levels[0] + 1


GRIDS = {
    "q8_0": Grid(tuple(range(-127, 128))),
    "q5_1": Grid(tuple(range(32)), shifted=True),
    "q5_0": Grid(tuple(range(-16, 16))),
    "q4_0": Grid(tuple(range(-8, 8))),
    "q4_k": Grid(tuple(range(16)), shifted=True, together=8),
    "q4_1": Grid(tuple(range(16)), shifted=True),
    "iq4_nl": Grid(IQ4_NL),
    "int4": Grid(tuple(range(-8, 8))),
}


def find_grid(quant: str, block: int = 32) -> Grid:
    """The grid of a type; ``block`` is that of ONNX int4, GGUF's are 32."""
    return replace(GRIDS[quant], block=block)


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

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rounded:
        """The same with other rows, or rows in another order: ``change`` gets all that has a row for each output."""
        return Rounded(change(self.codes), change(self.scales), change(self.minima))


def join_rows(matrices: list[Rounded]) -> Rounded:
    """Matrices of the same inputs as one, the first on top."""
    return Rounded(
        torch.cat([matrix.codes for matrix in matrices]),
        torch.cat([matrix.scales for matrix in matrices]),
        torch.cat([matrix.minima for matrix in matrices]),
    )


def fit_scales(blocks: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of each block of ``blocks``, (…, block), least in squares weighed by ``importance``.

    The scale is tried at shares of the one that reaches the largest weight, and each time put where the levels that the
    weights then have want it.
    """
    minimum = torch.zeros(blocks.shape[:-1])
    if grid.together > 1:
        minimum = -_six_bits(-blocks.amin(-1).clamp(max=0), grid)
    elif grid.shifted:
        minimum = _kept(blocks.amin(-1))
    if grid.shifted:
        widest = (blocks.amax(-1) - minimum) / grid.levels[-1]
    else:
        place = blocks.abs().argmax(-1, keepdim=True)
        widest = blocks.gather(-1, place).squeeze(-1) / grid.levels[0]
    best, least = _kept(widest), torch.full(widest.shape, torch.inf)
    for trial in TRIALS:
        tried = widest * trial
        codes, _ = nearest(blocks, tried[..., None], minimum[..., None], grid)
        levels = _levels(codes, grid)
        above = (importance * levels * (blocks - minimum[..., None])).sum(-1)
        below = (importance * levels.square()).sum(-1)
        for scale in (_kept(tried), _kept(torch.where(below > 0, above / below.clamp(min=1e-30), tried))):
            _, values = nearest(blocks, scale[..., None], minimum[..., None], grid)
            loss = ((blocks - values).square() * importance).sum(-1)
            better = loss < least
            best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return (_six_bits(best, grid) if grid.together > 1 else best), minimum


def _six_bits(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Values of blocks, (…, blocks), as multiples up to 63 of a float16 that the blocks of one large block share."""
    groups = values.unflatten(-1, (-1, grid.together))
    step = _kept(groups.amax(-1, keepdim=True) / SIX_BITS)
    levels = torch.where(step > 0, groups / step.clamp(min=1e-30), 0.0).round().clamp(0, SIX_BITS)
    return (levels * step).flatten(-2)


def _levels(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    if grid.even:
        return codes.float() + grid.levels[0]
    return torch.tensor(grid.levels, dtype=torch.float32)[codes.long()]


def nearest(
    weights: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the nearest levels, uint8, and what they stand for; a scale of 0 gives the level nearest 0."""
    wanted = (weights - minimum) * torch.where(scale == 0, 0.0, 1 / scale)
    if grid.even:
        level = wanted.round_().clamp_(grid.levels[0], grid.levels[-1])
        return (level - grid.levels[0]).to(torch.uint8), level * scale + minimum
    levels = torch.tensor(grid.levels, dtype=torch.float32)
    codes = torch.bucketize(wanted.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), levels[codes] * scale + minimum


def _kept(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def gguf_blocks(rounded: Rounded, quant: str) -> np.ndarray:
    """The matrix as ggml lays its blocks out, (outputs, bytes of a row) uint8."""
    grid = GRIDS[quant]
    if grid.together > 1:
        return _k_blocks(rounded, grid)
    outputs = len(rounded.codes)
    codes = rounded.codes.numpy().reshape(outputs, -1, grid.block)
    heads = [rounded.scales.numpy(), *([rounded.minima.numpy()] if grid.shifted else [])]
    parts = [head.astype(np.float16)[..., None].view(np.uint8) for head in heads]
    if quant == "q8_0":
        parts.append((codes.astype(np.int16) + grid.levels[0]).astype(np.int8).view(np.uint8))
    else:  # a byte holds a weight of the first half of its block and one of the second, their fifth bits apart
        if len(grid.levels) == 32:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
            codes = codes & 15
        parts.append(codes[..., : grid.block // 2] | codes[..., grid.block // 2 :] << 4)
    return np.concatenate(parts, axis=-1).reshape(outputs, -1)


def _k_blocks(rounded: Rounded, grid: Grid) -> np.ndarray:
    """q4_k: of 256 weights two float16, eight scales and minima of six bits on twelve bytes, 128 bytes of codes."""
    outputs = len(rounded.codes)
    heads, levels = [], []
    for values in (rounded.scales, -rounded.minima):
        groups = values.numpy().reshape(outputs, -1, grid.together)
        step = groups.max(axis=-1, keepdims=True) / SIX_BITS  # exact: the largest is 63 of them
        heads.append(step.astype(np.float16).view(np.uint8))
        levels.append(np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0)).astype(np.uint8))
    (low_scales, high_scales), (low_minima, high_minima) = (np.split(part, 2, axis=-1) for part in levels)
    packed = [  # the upper two bits of the last four stand above the first four's six
        low_scales | high_scales >> 4 << 6,
        low_minima | high_minima >> 4 << 6,
        high_scales & 15 | (high_minima & 15) << 4,
    ]
    pairs = rounded.codes.numpy().reshape(outputs, -1, grid.together // 2, 2, grid.block)
    codes = pairs[..., 0, :] | pairs[..., 1, :] << 4
    parts = [*heads, *packed, codes.reshape(outputs, codes.shape[1], -1)]
    return np.concatenate(parts, axis=-1).reshape(outputs, -1)
