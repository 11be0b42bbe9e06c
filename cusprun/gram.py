"""Second moments of a matrix's inputs over two halves of the text, so that one half can judge what the other fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cusprun.statistics import Batch

BLOCK = 384  # columns of a product with itself that are taken at a time
ROWS = 512  # of the moments that are in float64 at a time where a product needs them so


@dataclass
class Gram:
    """Sums over tokens, by half of the windows: x xᵀ, (n, n), and where a target t is given t xᵀ, (rows, n), and ‖t‖².

    Sums are kept in float32, products of one batch added at a time; means come out in float64.
    """

    inputs: list[torch.Tensor]
    crossed: list[torch.Tensor] | None
    energy: list[float]
    counts: list[int]

    @classmethod
    def empty(cls, n: int, rows: int | None = None, *, halves: int = 2) -> Gram:
        """No tokens yet; with ``rows`` there will be targets of that size. ``halves`` is 1 where all is one text."""
        crossed = None if rows is None else [torch.zeros(rows, n) for _ in range(halves)]
        return cls([torch.zeros(n, n) for _ in range(halves)], crossed, [0.0] * halves, [0] * halves)

    def __add__(self, other: Gram) -> Gram:
        """Moments of both texts."""
        crossed = None
        if self.crossed is not None and other.crossed is not None:
            crossed = [mine + theirs for mine, theirs in zip(self.crossed, other.crossed, strict=True)]
        return Gram(
            [mine + theirs for mine, theirs in zip(self.inputs, other.inputs, strict=True)],
            crossed,
            [mine + theirs for mine, theirs in zip(self.energy, other.energy, strict=True)],
            [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)],
        )

    def add(self, x: torch.Tensor, half: int, target: torch.Tensor | None = None) -> None:
        """Adds the rows of ``x``, (tokens, n), to one half, with their targets, (tokens, rows)."""
        _add_square(self.inputs[half], x)
        self.counts[half] += len(x)
        if self.crossed is not None and target is not None:
            self.crossed[half] += (target.T @ x).cpu()
            self.energy[half] += float(target.square().sum(dtype=torch.float64))

    def add_windows(self, x: torch.Tensor, start: int, window: int, target: torch.Tensor | None = None) -> None:
        """Adds whole windows of tokens, of which the first has the number ``start``: every other one to either half."""
        windows = x.unflatten(0, (-1, window))
        targets = None if target is None else target.unflatten(0, (-1, window))
        for offset in range(min(2, len(windows))):
            part = None if targets is None else targets[offset::2].flatten(0, 1)
            self.add(windows[offset::2].flatten(0, 1), (start + offset) % 2, part)

    def add_batch(self, x: torch.Tensor, batch: Batch) -> None:
        """Adds a batch's inputs."""
        self.add_windows(x, batch.start, batch.window)

    def release(self) -> None:
        """Gives the sums back; nothing can be read from them after."""
        self.inputs, self.crossed = [], None

    def mean(self, *halves: int) -> torch.Tensor:
        """E[x xᵀ] over the named halves, (n, n) float64. Raises ValueError where they hold no token."""
        return self._sum(self.inputs, halves)

    def inside(self, kept: torch.Tensor, half: int) -> torch.Tensor:
        """E[x_S x_Sᵀ] over one half, (kept, kept) float64, without the whole matrix in float64 beside it."""
        return self.inputs[half][kept][:, kept].double().div_(self._tokens(half))

    def through(self, matrix: torch.Tensor, half: int) -> torch.Tensor:
        """E[W x xᵀ] over one half for W, (rows, n) float64, likewise."""
        found = torch.zeros_like(matrix)
        for columns in torch.arange(matrix.shape[1]).split(ROWS):
            found.addmm_(matrix[:, columns], self.inputs[half][columns].double())
        return found.div_(self._tokens(half))

    def _tokens(self, half: int) -> int:
        if not self.counts[half]:
            raise ValueError("no token was added to this half")
        return self.counts[half]

    def cross(self, *halves: int) -> torch.Tensor:
        """E[t xᵀ] over the named halves, (rows, n) float64."""
        if self.crossed is None:
            raise ValueError("these moments were taken without a target")
        return self._sum(self.crossed, halves)

    def _sum(self, sums: list[torch.Tensor], halves: tuple[int, ...]) -> torch.Tensor:
        count = sum(self.counts[half] for half in halves)
        if count == 0:
            raise ValueError("no token was added to this half")
        total = sums[halves[0]].double()
        for half in halves[1:]:
            total += sums[half]
        return total.div_(count)


def _add_square(sums: torch.Tensor, x: torch.Tensor) -> None:
    """Adds xᵀx to the symmetric ``sums``, (n, n), for ``x``, (tokens, n): a product for each block on and below the
    diagonal, the others are mirrored.
    """
    for begin in range(0, x.shape[1], BLOCK):
        rows = slice(begin, begin + BLOCK)
        below = (x[:, begin:].T @ x[:, rows]).cpu()  # (n - begin, block)
        sums[begin:, rows] += below
        sums[rows, begin + BLOCK :] += below[BLOCK:].T
