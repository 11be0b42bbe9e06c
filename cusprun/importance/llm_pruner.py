"""LLM-Pruner (Ma et al., NeurIPS 2023, arXiv:2305.11627): the loss's Taylor expansion, summed over coupled weights.

With w a weight, g its loss gradient averaged over the samples and F the mean of the samples' squared gradients (the
diagonal of the Fisher matrix for the Hessian's), a group of coupled weights has the importance

    vector    Σ |Σ_v w g|  over the rows and columns v of the group: the first-order change by each as a whole
    element1  Σ |w g|
    element2  Σ |w² F|
    mix       Σ |w g - ½ w² F|

FFN channel k couples row k of gate and up and column k of down; a kv group its rows of q, k and v and columns of o.
A sample is a window of calibration text. Block-wise as in the paper's main experiments: the same share goes in every
layer and kind but for the first and last layers, which stay whole (4 and 2 of 32). ``llm-pruner`` is element1, the
default of their code for grouped-query models. Fine-tuning after the cut is none of this file's.
"""

from __future__ import annotations

from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices
from cusprun.moments import VARIANTS, LayerStatistics, asked


def score_vector(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
    """Σ |Σ_v w g| of each channel, (channels,), and each kv group, (groups,)."""
    sums = asked(seen.gradients, "gradients")
    ffn, attention = (vectors.abs().sum(1) / sums.count for vectors in (sums.ffn_vectors, sums.attention_vectors))
    return LayerImportance(ffn=ffn, attention=attention)


def _element_wise(name: str, variant: str) -> Criterion:
    place = VARIANTS.index(variant)

    def score(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
        """The variant's sum over the weights of each channel, (channels,), and each kv group, (groups,)."""
        sums = asked(seen.gradients, "gradients")
        return LayerImportance(ffn=sums.ffn[place] / sums.count, attention=sums.attention[place] / sums.count)

    return _criterion(name, score)


def _criterion(name: str, score: object) -> Criterion:
    return Criterion(
        name=name,
        paper="https://arxiv.org/abs/2305.11627",
        score=score,  # type: ignore[arg-type]
        needs=frozenset({"gradients"}),
        allocation="middle",
    )


CRITERIA = (
    _element_wise("llm-pruner", "element1"),
    _criterion("llm-pruner-vector", score_vector),
    _element_wise("llm-pruner-element2", "element2"),
    _element_wise("llm-pruner-mix", "mix"),
)
