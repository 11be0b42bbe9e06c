"""FLAP (An et al., AAAI 2024, arXiv:2312.11983): what fluctuates little can be replaced by its mean.

The fluctuation of input j is Var(x_j)·‖W[:, j]‖² (WIFV): the squared error of the output when x_j gives way to a bias
that holds its mean. Within each layer, and for down_proj and o_proj apart, it is made comparable by (s - mean) / std,
its z, and one cut goes through the z of all layers' heads and channels (structure AL-AM), a unit weighing what it has
parameters. As in their code, the columns of o_proj enter with the square of the fluctuation, and a head, here a kv
group, has the mean of its columns' z. The variance is the exact one over the tokens of the dense model's inputs; their
code approximates it sample by sample. The mean of the removed inputs times W becomes the bias of o_proj and down_proj.
"""

from __future__ import annotations

import torch

from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices
from cusprun.moments import LayerStatistics, Moments, asked


def score(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
    """z-scores within the layer of each channel, (channels,), and each kv group, (groups,); negative below the mean."""
    plain = asked(seen.plain, "plain")
    columns = standardized(fluctuation(matrices.output, plain.attention).square())
    return LayerImportance(
        ffn=standardized(fluctuation(matrices.down, plain.ffn)),
        attention=matrices.sum_groups(columns) * matrices.groups() / len(columns),
    )


def fluctuation(matrix: torch.Tensor, inputs: Moments) -> torch.Tensor:
    """Var(x_j)·‖W[:, j]‖² of each column j of ``matrix``, (rows, columns) -> (columns,)."""
    return inputs.variance() * matrix.double().square().sum(0)


def standardized(values: torch.Tensor) -> torch.Tensor:
    """(values - mean) / standard deviation; zeros where all values are equal."""
    spread = values.std()
    return (values - values.mean()) / spread if float(spread) > 0 else torch.zeros_like(values)


def compensation(matrix: torch.Tensor, inputs: Moments, gone: torch.Tensor) -> torch.Tensor:
    """Bias that stands for the removed inputs: W[:, gone] E[x_gone], (rows,) float64. ``gone`` numbers columns."""
    return matrix.double()[:, gone] @ inputs.mean()[gone]


CRITERION = Criterion(
    name="flap",
    paper="https://arxiv.org/abs/2312.11983",
    score=score,
    needs=frozenset({"plain"}),
    allocation="global",
    compensates=True,
)
