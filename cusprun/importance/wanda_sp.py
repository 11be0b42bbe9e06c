"""Wanda-sp: Wanda (Sun et al., ICLR 2024, arXiv:2306.11695) made structured by FLAP's authors (arXiv:2312.11983).

A weight's importance is |W_ij|·‖x_j‖, ‖x_j‖ the norm of its input over the calibration tokens. For FFN channel k the
mean over the rows of down_proj is taken, for a head, here a kv group, the sum of such means over its columns of o_proj;
the same share goes in every layer and kind. Here ‖x_j‖ is the root mean square, which orders units alike and compares
across dimensions, and all layers see the dense model's inputs; their code goes on with the pruned layers' outputs.
"""

from __future__ import annotations

import torch

from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices
from cusprun.moments import LayerStatistics, Moments, asked


def score(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
    """Mean over rows of |W|·‖x‖ for each channel, (channels,), summed over columns for each kv group, (groups,)."""
    plain = asked(seen.plain, "plain")

    def columns(matrix: torch.Tensor, inputs: Moments) -> torch.Tensor:
        norms = (inputs.diagonal() / inputs.count).sqrt()  # (columns,)
        return matrix.double().abs().mean(0) * norms

    attention = matrices.sum_groups(columns(matrices.output, plain.attention))
    return LayerImportance(ffn=columns(matrices.down, plain.ffn), attention=attention)


CRITERION = Criterion(
    name="wanda-sp",
    paper="https://arxiv.org/abs/2312.11983",
    score=score,
    needs=frozenset({"plain"}),
    allocation="even",
)
