"""ShortGPT (Men et al. 2024, arXiv:2403.03853): whole layers go, those first that change the hidden state least.

A layer's influence is BI_l = 1 - E_t[cos(x_l,t, x_{l+1},t)], equation (1) of the paper, x_l and x_{l+1} being the
hidden states before and after it. No neuron is scored; what comes out is a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import InvalidRequest
from cusprun.plan import LayerPlan, Plan, make_plan
from cusprun.progress import say

if TYPE_CHECKING:
    import numpy as np

    from cusprun.anatomy import Anatomy

NAME = "shortgpt"
PAPER = "arXiv:2403.03853"


def shortgpt_plan(
    dense_folder: Path, anatomy: Anatomy, windows: Mapping[str, np.ndarray], ratio: float, device: str = "cpu"
) -> Plan:
    """The plan without the least influential layers, ``ratio`` of all parameters as nearly as whole layers allow.

    ``windows`` maps each dimension to token ids, (n, window) int64; all tokens count alike. Says on stderr which layers
    go and what share that is. Raises InvalidRequest where all layers but one are less than ``ratio``, and what
    :func:`cusprun.statistics.walk` raises.
    """
    plan = drop_layers(anatomy, measure_influence(dense_folder, anatomy, windows, device), ratio)
    gone = [str(index) for index, kept in enumerate(plan.layers) if kept.dropped]
    say(f"{NAME}: layers {', '.join(gone)} go, {plan.removed_share:.1%} of all parameters (wanted {ratio:.1%})")
    return plan


def measure_influence(
    dense_folder: Path, anatomy: Anatomy, windows: Mapping[str, np.ndarray], device: str = "cpu"
) -> list[float]:
    """Every layer's influence, between 0 and 2, from one pass over ``windows``."""
    import torch
    from torch.nn.functional import cosine_similarity, embedding

    from cusprun.checkpoint import Weights
    from cusprun.statistics import walk

    layers = walk(dense_folder, anatomy, windows, label="influence, layer by layer", device=device)
    before: dict[str, torch.Tensor] = {}  # hidden states in front of the layer, (tokens, hidden)
    influence = []
    for index, batches in layers:
        if index == 0:  # the pass has checked the ids by now
            table = Weights(dense_folder)[anatomy.family.embedding]
            before = {name: embedding(torch.from_numpy(ids).flatten(), table).float() for name, ids in windows.items()}
        total, tokens = 0.0, 0
        for batch in batches:
            after, start = batch.out, batch.start * batch.window
            rows = before[batch.dimension][start : start + len(after)]  # a view: the next layer finds ``after`` there
            total += float((1 - cosine_similarity(rows.to(after.device), after, dim=1)).double().sum())
            tokens += len(after)
            rows.copy_(after)
        influence.append(total / tokens)
    return influence


def drop_layers(anatomy: Anatomy, influence: Sequence[float], ratio: float) -> Plan:
    """The plan without the least influential layers; at least one goes and one stays.

    Layers go in the order of their influence while that brings the removed share nearer to ``ratio``.
    """
    order = sorted(range(len(influence)), key=lambda index: (influence[index], index))[:-1]
    costs = [anatomy.layer_parameters(anatomy.layers[index]) for index in order]
    wanted = ratio * anatomy.parameters
    if wanted > sum(costs):
        most = sum(costs) / anatomy.parameters
        raise InvalidRequest(
            f"--ratio {ratio:g} is more than whole layers can give: all but one are {most:.3f} of this model"
        )
    count, removed = 0, 0
    while count < len(order) and (count == 0 or abs(removed + costs[count] - wanted) < abs(removed - wanted)):
        removed += costs[count]
        count += 1
    gone = set(order[:count])
    return make_plan(
        anatomy,
        tuple(
            LayerPlan((), ()) if index in gone else LayerPlan(tuple(range(layer.ffn)), tuple(range(layer.kv_heads)))
            for index, layer in enumerate(anatomy.layers)
        ),
    )
