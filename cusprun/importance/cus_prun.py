"""Cus-Prun (Zhao et al., Findings of ACL 2025, arXiv:2506.02561): the change of the layer's output without the unit.

A unit's relevance on a corpus is the squared change of the layer's output when it is ablated (their definition 2). The
output matrices are linear in their units, so that change has a closed form and no ablated forward pass is run:

- FFN channel k:  mean_t ‖W_down[:, k] h_tk‖² / ‖y_t‖² = ‖W_down[:, k]‖² H_kk
- kv group g:     mean_t ‖W_o[:, g] x_tg‖² / ‖y_t‖²    = tr(W_o[:, g] H_gg W_o[:, g]ᵀ)

with H the mean of x_t x_tᵀ / ‖y_t‖² and y_t the layer's output at token t. The score is the root: the root mean square
of the relative change, so that one ε means the same in every layer.
"""

from __future__ import annotations

from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices
from cusprun.moments import LayerStatistics


def score(seen: LayerStatistics, matrices: LayerMatrices) -> LayerImportance:
    """Relative change of the layer's output by removing each channel, (channels,), and each kv group, (groups,)."""
    down, output = matrices.down.double(), matrices.output.double()
    channels = down.square().sum(0) * seen.ffn.diagonal()
    groups = len(seen.attention.second)
    columns = output.reshape(len(output), groups, -1).transpose(0, 1)  # (groups, hidden, columns of a group)
    changes = ((columns @ seen.attention.second) * columns).sum((1, 2))
    return LayerImportance(
        ffn=(channels / seen.ffn.count).sqrt(),
        attention=(changes.clamp(min=0) / seen.attention.count).sqrt(),
    )


CRITERION = Criterion(name="cus-prun", paper="https://aclanthology.org/2025.findings-acl.1201", score=score)
