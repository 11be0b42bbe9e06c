"""Random: uniform numbers, the same for every text; what any importance has to beat.

``seeded`` gives other draws. The same seed gives the same cut of the same model; layers draw independently.
"""

from __future__ import annotations

import torch

from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices
from cusprun.moments import LayerStatistics


def seeded(seed: int) -> Criterion:
    """The random criterion that draws by ``seed``, a non-negative integer below 2³²."""

    def score(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
        """Uniform numbers in [0, 1) for each channel, (channels,), and each kv group, (groups,)."""
        generator = torch.Generator().manual_seed(seed * 2**20 + matrices.layer)  # a model has fewer layers than that
        ffn, attention = (
            torch.rand(count, generator=generator, dtype=torch.float64)
            for count in (matrices.down.shape[1], matrices.groups())
        )
        return LayerImportance(ffn=ffn, attention=attention)

    return Criterion(name="random", paper="", score=score, needs=frozenset(), allocation="even")


CRITERION = seeded(0)
