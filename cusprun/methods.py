"""A method from statistics to plan: its criterion scores the layers, its paper's allocation decides where to cut.

What FLAP adds to the plan, biases that stand for the removed inputs, is written here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.allocation import Layout, plan_ratio
from cusprun.allocation_rivals import plan_even, plan_even_uniform, plan_global
from cusprun.anatomy import Anatomy
from cusprun.checkpoint import Weights, write_weights
from cusprun.compact import unit_indices
from cusprun.errors import InvalidRequest
from cusprun.files import folder_written_whole
from cusprun.importance import Criterion, LayerMatrices, find_criterion
from cusprun.importance.combine import Combine, LayerScores, combine_layer, mix
from cusprun.importance.flap import compensation
from cusprun.moments import Moments, Statistics, asked
from cusprun.plan import LayerPlan, Plan

if TYPE_CHECKING:
    import torch

# LLM-Pruner keeps 4 first and 2 last of LLaMA-7B's 32 layers whole.
KEPT_FIRST, KEPT_LAST, OF_LAYERS = 4, 2, 32


def score_layers(
    weights: Weights,
    anatomy: Anatomy,
    statistics: Statistics,
    method: str | Criterion,
    combine: Combine,
    mixing: Mapping[str, float] | None = None,
) -> list[LayerScores]:
    """Scores of every layer by ``method``, combined over the dimensions; one layer's weights are read at a time.

    ``mixing`` holds the dimensions' weights, which count where ``combine`` is "mixture".
    """
    criterion = find_criterion(method) if isinstance(method, str) else method
    scores = []
    for index, seen in enumerate(statistics):
        prefix = anatomy.prefix(index)
        down, output = weights[f"{prefix}mlp.down_proj.weight"], weights[f"{prefix}self_attn.o_proj.weight"]
        family = anatomy.family
        if family.ffn_norm_behind is not None:  # rows reach the residual stream through the norm's weights
            down = down * (weights[f"{prefix}{family.ffn_norm_behind}.weight"] + family.norm_offset)[:, None]
        if family.attention_norm_behind is not None:
            output = output * (weights[f"{prefix}{family.attention_norm_behind}.weight"] + family.norm_offset)[:, None]
        matrices = LayerMatrices(
            down=down,
            output=output,
            kv_heads=anatomy.layers[index].kv_heads,
            layer=index,
        )
        scores.append(combine_layer(seen, matrices, criterion, combine, mixing or {}))
    return scores


def plan_method(
    criterion: Criterion, anatomy: Anatomy, scores: Sequence[LayerScores], ratio: float, *, align: int, layout: Layout
) -> Plan:
    """The plan that removes ``ratio`` of all parameters where the criterion's paper cuts.

    With ``layout`` "uniform" methods that would give layers different widths cut the same share everywhere (FLAP's
    UL-UM). Raises InvalidRequest where the ratio is too large, or the layout leaves no layer whole and the method must.
    """
    if criterion.allocation == "cus-prun":
        return plan_ratio(anatomy, scores, ratio, align=align, layout=layout)
    if criterion.allocation == "middle":
        if layout == "uniform":
            raise InvalidRequest(f"--method {criterion.name} keeps its first and last layers whole: --layout per-layer")
        first, last = kept_whole(len(anatomy.layers))
        return plan_even(anatomy, scores, ratio, align=align, keep_first=first, keep_last=last)
    if layout == "uniform":
        plan = plan_even_uniform(anatomy, scores, ratio, align=align)
        return with_output_biases(plan) if criterion.compensates else plan
    if criterion.allocation == "global":
        return plan_global(anatomy, scores, ratio, align=align, output_biases=criterion.compensates)
    return plan_even(anatomy, scores, ratio, align=align)


def kept_whole(layers: int) -> tuple[int, int]:
    """First and last layers that LLM-Pruner keeps whole, of ``layers``: its paper's proportion, rounded."""
    first, last = ((kept * layers * 2 + OF_LAYERS) // (2 * OF_LAYERS) for kept in (KEPT_FIRST, KEPT_LAST))
    return first, last


def with_output_biases(plan: Plan) -> Plan:
    """The same plan whose expert has biases."""
    return Plan.from_json({**plan.to_json(), "attention_bias": True, "mlp_bias": True}, plan.dense)


def bias_compensation(
    dense_folder: Path,
    plan: Plan,
    statistics: Statistics,
    out_folder: Path,
    mixing: Mapping[str, float] | None = None,
) -> Plan:
    """Writes the biases of o_proj and down_proj that stand for what ``plan`` removes; returns it with biases.

    Each is W E[x] over the removed inputs, with E[x] the dimensions' mean weighted by ``mixing``, plus the bias that
    the dense model has there. ``out_folder`` appears whole or not at all, for ``compact(refitted=...)``. Dropped layers
    and attention blocks get none. Raises InvalidRequest where the statistics hold no plain moments.
    """
    plan = with_output_biases(plan)
    names = {
        f"{plan.dense.prefix(index)}{part}.bias": plan.dense.hidden_size * 4
        for index, kept in enumerate(plan.layers)
        for part in _biased(kept)
    }
    with folder_written_whole(out_folder) as part:
        write_weights(part, _biases(Weights(dense_folder), plan, statistics, mixing or {}), names)
    return plan


def _biased(kept: LayerPlan) -> list[str]:
    """The matrices of a layer that get a bias."""
    return [name for name, stays in (("self_attn.o_proj", kept.kv_heads), ("mlp.down_proj", not kept.dropped)) if stays]


def _biases(
    weights: Weights, plan: Plan, statistics: Statistics, mixing: Mapping[str, float]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The biases by name, (hidden,) float32, in the order of the layers."""
    import torch

    for index, (kept, seen) in enumerate(zip(plan.layers, statistics, strict=True)):
        plain = asked(mix(seen, mixing).plain, "plain")
        before = plan.dense.layers[index]
        for name in _biased(kept):
            inputs: Moments = plain.attention if name == "self_attn.o_proj" else plain.ffn
            unit = "heads" if name == "self_attn.o_proj" else "ffn"
            gone = torch.ones(len(inputs.first), dtype=torch.bool)
            gone[unit_indices(kept, unit, before.queries_per_kv, plan.dense.head_dim)] = False
            matrix = f"{plan.dense.prefix(index)}{name}"
            bias = compensation(weights[f"{matrix}.weight"], inputs, gone.nonzero().flatten())
            if f"{matrix}.bias" in weights:
                bias += weights[f"{matrix}.bias"].double()
            yield f"{matrix}.bias", bias.float()
