"""Magnitude: the norm of the weights that read a unit, whatever the text; the floor of every comparison.

As FLAP's authors take it for their comparison (prune_magnitude_sp of their code): for FFN channel k ‖W_down[:, k]‖, for
a head the sum of ‖W_o[:, j]‖ over its columns, here over those of a kv group; the same share goes in every layer.
"""

from __future__ import annotations

from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices
from cusprun.moments import LayerStatistics


def score(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
    """Norms of the columns that read each channel, (channels,), and each kv group, (groups,)."""
    columns = matrices.output.double().norm(dim=0)
    return LayerImportance(ffn=matrices.down.double().norm(dim=0), attention=matrices.sum_groups(columns))


CRITERION = Criterion(
    name="magnitude",
    paper="https://arxiv.org/abs/2312.11983",
    score=score,
    needs=frozenset(),
    allocation="even",
)
