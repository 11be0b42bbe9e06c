"""Which units a method keeps when the calibration windows are drawn again: bootstrap, and one window for another.

Cus-Prun, Wanda-sp and FLAP score the units on statistics summed over the drawn windows, refit chooses by optimal brain
surgeon on their moments; the same share of every layer's units goes, so that the ranking alone is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from cusprun.checkpoint import Weights
from cusprun.dense import Dense
from cusprun.importance import LayerMatrices, find_criterion
from cusprun.importance.combine import combine_layer
from cusprun.moments import LayerStatistics
from cusprun.progress import say
from cusprun.recipe import make_recipe

SCORED = ("cus-prun", "wanda-sp", "flap")
REFIT = "refit"

# Windows that one draw takes, with repetition: per dimension the numbers of its windows.
Draw = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Kept:
    """Units of one layer that stay."""

    ffn: frozenset[int]
    kv_groups: frozenset[int]


def bootstrap(sizes: Mapping[str, int], count: int, seed: int) -> list[Draw]:
    """``count`` draws of as many windows as there are, with replacement, within each dimension."""
    chance = np.random.default_rng(seed)
    return [{name: chance.integers(0, size, size) for name, size in sizes.items()} for _ in range(count)]


def replacements(sizes: Mapping[str, int], count: int, seed: int) -> list[Draw]:
    """All windows but each dimension's last, and ``count`` draws in which that last one stands for one of these.

    Raises ValueError where a dimension has fewer than two windows. The first draw is the one to compare with.
    """
    if min(sizes.values()) < 2:
        raise ValueError("one window cannot stand for another where there is one")
    chance = np.random.default_rng(seed)
    base = {name: np.arange(size - 1) for name, size in sizes.items()}
    draws: list[Draw] = [base]
    for _ in range(count):
        name = list(sizes)[int(chance.integers(len(sizes)))]
        drawn = base[name].copy()
        drawn[int(chance.integers(len(drawn)))] = sizes[name] - 1
        draws.append({**base, name: drawn})
    return draws


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """|A ∩ B| / |A ∪ B|; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one | other else 1.0


def by_chance(share: float) -> float:
    """Jaccard index to expect of two independent random sets that hold ``share`` of all units."""
    return share / (2 - share)


def choose_scored(
    dense: Dense,
    windows: Mapping[str, np.ndarray],
    draws: Sequence[Draw],
    layers: Sequence[int],
    remove: float,
    method: str,
) -> dict[int, list[Kept]]:
    """For each of ``layers`` what ``method`` keeps under each draw; ``windows`` maps dimensions to (n, window) ids."""
    from cusprun.statistics import stream

    criterion, combine = find_criterion(method), make_recipe({"method": method, "lang": "en"}).combined
    apart = {
        f"{name}#{number}": ids[number : number + 1] for name, ids in windows.items() for number in range(len(ids))
    }
    weights, found = Weights(dense.folder), dict[int, list[Kept]]()
    for index, seen in enumerate(stream(dense.folder, dense.anatomy, apart, needs=criterion.needs)):
        if index not in layers:
            continue
        prefix, widths = dense.anatomy.prefix(index), dense.anatomy.layers[index]
        matrices = LayerMatrices(
            weights[f"{prefix}mlp.down_proj.weight"], weights[f"{prefix}self_attn.o_proj.weight"],
            widths.kv_heads, index,
        )  # fmt: skip
        found[index] = []
        for draw in draws:
            statistics = {name: _sum(seen, name, numbers, windows[name].shape[1]) for name, numbers in draw.items()}
            tokens = {name: float(len(numbers)) for name, numbers in draw.items()}  # of one window each
            scores = combine_layer(statistics, matrices, criterion, combine, tokens)
            ffn, groups = stays(widths.ffn, remove), stays(widths.kv_heads, remove)
            found[index].append(Kept(frozenset(scores.ffn.last(ffn)), frozenset(scores.attention.last(groups))))
    return found


def stays(units: int, remove: float) -> int:
    """How many of ``units`` stay, at least one."""
    return max(1, units - round(units * remove))


def _sum(seen: Mapping[str, LayerStatistics], name: str, numbers: np.ndarray, window: int) -> LayerStatistics:
    """Statistics of the drawn windows together, each as often as it was drawn."""
    total: LayerStatistics | None = None
    for number, times in zip(*np.unique(numbers, return_counts=True), strict=True):
        part = seen[f"{name}#{number}"].scaled(float(times * window))
        total = part if total is None else total + part
    if total is None:
        raise ValueError(f"no window of {name} was drawn")
    return total


def choose_refit(
    dense: Dense, windows: Mapping[str, np.ndarray], draws: Sequence[Draw], layers: Sequence[int], remove: float
) -> dict[int, list[Kept]]:
    """The same for refit: optimal brain surgeon on E[x xᵀ] of the drawn windows of all dimensions."""
    import torch

    from cusprun.statistics import walk
    from cusprun.surgeon import choose_columns, choose_groups

    weights, found = Weights(dense.folder), dict[int, list[Kept]]()
    for index, batches in walk(dense.folder, dense.anatomy, windows, label="inputs, layer by layer"):
        inputs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in windows}
        for batch in batches:
            if index in layers:
                inputs[batch.dimension].append((batch.channels.cpu(), batch.heads.cpu()))
        if index not in layers:
            continue
        prefix, widths = dense.anatomy.prefix(index), dense.anatomy.layers[index]
        down = weights[f"{prefix}mlp.down_proj.weight"].double()
        output = weights[f"{prefix}self_attn.o_proj.weight"].double()
        run = widths.queries_per_kv * dense.anatomy.head_dim
        whole = {
            name: tuple(
                torch.cat(parts).unflatten(0, (-1, windows[name].shape[1])) for parts in zip(*held, strict=True)
            )
            for name, held in inputs.items()
        }  # (n, window, columns) of down_proj and of o_proj
        found[index] = []
        for draw in draws:
            ffn, heads = (_moments([held[part] for held in whole.values()], list(draw.values())) for part in (0, 1))
            columns = choose_columns(down, [ffn], [stays(widths.ffn, remove)])[0]
            groups = choose_groups(output, [heads], [stays(widths.kv_heads, remove)], run)[0]
            found[index].append(Kept(frozenset(columns), frozenset(groups)))
        say(f"refit, layer {index}: {len(draws)} selections")
    return found


def _moments(inputs: Sequence[Any], draws: Sequence[np.ndarray]) -> Any:
    """E[x xᵀ], float64, over the drawn windows of every dimension; ``inputs`` are (n, window, columns)."""
    import torch

    columns = inputs[0].shape[2]
    total, count = torch.zeros(columns, columns), 0
    for held, numbers in zip(inputs, draws, strict=True):
        for number, times in zip(*np.unique(numbers, return_counts=True), strict=True):
            total.addmm_(held[number].T, held[number], alpha=float(times))
            count += int(times) * held.shape[1]
    return total.double() / count


def compare(kept: Mapping[int, Sequence[Kept]], dense: Dense) -> dict[str, Any]:
    """Jaccard indices of every draw with the first, by layer: of the channels kept, of those removed, of the kv groups
    kept.
    """
    layers: dict[str, dict[str, list[float]]] = {}
    for index, draws in kept.items():
        first, everything = draws[0], frozenset(range(dense.anatomy.layers[index].ffn))
        layers[str(index)] = {
            "kept": [jaccard(first.ffn, other.ffn) for other in draws[1:]],
            "removed": [jaccard(everything - first.ffn, everything - other.ffn) for other in draws[1:]],
            "kv groups": [jaccard(first.kv_groups, other.kv_groups) for other in draws[1:]],
        }
    names = ("kept", "removed", "kv groups")
    return {
        "layers": layers,
        **{name: mean(value for layer in layers.values() for value in layer[name]) for name in names},
        **{f"{name}, least": min(value for layer in layers.values() for value in layer[name]) for name in names},
    }
