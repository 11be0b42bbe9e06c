"""What each cut of each layer costs, measured: the losses that the integer program adds up.

The calibration windows go through the dense layers once. At each layer H is formed, the layer is cut to a few widths
and refitted alone, and a few probe windows go on from its output to the end of the model. What a cut does is the mean
Kullback-Leibler divergence of the next-token distribution from the dense model's: on few tokens that is far less noisy
than the difference of two cross entropies. The sum of all differences over the sum of all divergences turns the one
into the other, so that a cut's loss is in nats of cross entropy a token, as the price of a vocabulary row is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.structure import MIN_FFN
from cusprun.arithmetic import bfloat16_products
from cusprun.gram import Gram
from cusprun.layerwise import Kind, LayerwiseModel
from cusprun.least_squares import refitted
from cusprun.progress import say, track
from cusprun.refit import DOWN, OUTPUT, group_columns
from cusprun.sinks import scales
from cusprun.statistics import Batch, walk
from cusprun.surgeon import choose_columns, choose_groups

FFN_SHARES = (0.7, 0.4)  # of the channels that stay
DEEP_SHARES = (0.2, 0.0)  # where much is to go; 0 stands for the least that any layer may keep
HEAD_SHARES = (0.75, 0.5, 0.25)  # of the kv heads, rounded to whole ones
STEPS = 6  # blocks in which the channels go; the refit takes its time
EVERY = 4  # one position in so many is scored: the output matrix costs as much as several layers
DEAR = 3.0  # attention is not measured below the level where a parameter costs so many times the FFN's narrow half
DEEP = 0.3  # the share of all parameters above which narrow FFNs are measured as well
RIDGE = 1e-2  # of the mean diagonal; a cut's loss depends little on it
PROBES = "/probes"  # no name that a dimension can have
WINDOWS, TOKENS = 6, 128  # that a cut's loss is measured on


@dataclass(frozen=True)
class LayerSensitivity:
    """Losses of one layer's cuts, nats of cross entropy a token, by the width that stays."""

    ffn: dict[int, float]  # channels -> loss
    kv_heads: dict[int, float]  # kv heads -> loss
    dropped: float | None  # of the whole layer going; None where it may not go

    def to_json(self) -> dict[str, Any]:
        return {"ffn": _pairs(self.ffn), "kv_heads": _pairs(self.kv_heads), "dropped": self.dropped}

    def within(self, *, attention_goes: bool, layers_go: bool) -> LayerSensitivity:
        """Without the cuts that may not be made: the attention block whole, the layer whole."""
        heads = {width: loss for width, loss in self.kv_heads.items() if width or attention_goes}
        return LayerSensitivity(self.ffn, heads, self.dropped if layers_go else None)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LayerSensitivity:
        return cls(dict(map(tuple, value["ffn"])), dict(map(tuple, value["kv_heads"])), value["dropped"])


def _pairs(losses: dict[int, float]) -> list[list[float]]:
    return [[width, loss] for width, loss in losses.items()]


def probe_windows(windows: Mapping[str, np.ndarray]) -> np.ndarray:
    """WINDOWS short windows, (WINDOWS, TOKENS), in turn from every dimension: the starts of its second ones."""
    turns = [ids[1 + turn, :TOKENS] for turn in range(WINDOWS) for ids in windows.values() if len(ids) > 1 + turn]
    return np.stack(turns[:WINDOWS])


def ffn_levels(widths: LayerWidths, *, deep: bool) -> list[int]:
    """Channel counts that are measured, descending; ``deep`` adds narrow ones down to the least that may stay."""
    shares = FFN_SHARES + (DEEP_SHARES if deep else ())
    levels = {max(MIN_FFN, round(share * widths.ffn)) for share in shares}
    return sorted((level for level in levels if level < widths.ffn), reverse=True)


def head_levels(widths: LayerWidths) -> list[int]:
    """kv head counts that are measured in any case, descending, down to one."""
    levels = {max(1, round(share * widths.kv_heads)) for share in HEAD_SHARES}
    return sorted((level for level in levels if level < widths.kv_heads), reverse=True)


def measure(
    dense: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    probes: np.ndarray,
    *,
    deep: bool = False,
    device: str = "cpu",
) -> list[LayerSensitivity]:
    """Sensitivities of every layer. ``windows`` give H, (n, window) ids a dimension; ``probes``, likewise, the loss.

    ``deep`` measures the narrowest FFN too. Attention going whole, and the layer, are measured where one kv head less
    than all is not dear already. Raises what :func:`cusprun.statistics.walk` raises.
    """
    with bfloat16_products(device):
        effects = list(_layers(LayerwiseModel(dense, anatomy, device, fast=True), dense, windows, probes, deep))
    every = [effect for layer in effects for effect in layer.values()]
    exchange = _exchange(every)
    return [_sensitivity(layer, exchange) for layer in effects]


def _exchange(effects: Sequence[_Effect]) -> float:
    """Nats of cross entropy that a nat of divergence costs, over all cuts; 1 where the probes cannot tell: text that
    the dense model does not predict gets no worse by cutting it.
    """
    divergence, loss = (sum(getattr(effect, name) for effect in effects) for name in ("divergence", "loss"))
    if divergence > 0 and loss <= 0:
        say("the cuts do not make the calibration text less likely: layers are compared by how far the model moves")
    return loss / divergence if divergence > 0 and loss > 0 else 1.0


def _layers(
    model: LayerwiseModel, dense: Path, windows: Mapping[str, np.ndarray], probes: np.ndarray, deep: bool
) -> Iterator[dict[Cut, _Effect]]:
    """What the cuts of each layer do."""
    reference = _reference(model, probes)
    passes = walk(dense, model.anatomy, {**windows, PROBES: probes}, label="sensitivity", model=model)
    for index, batches in passes:
        cuts = _Cuts(model, index, batches)
        found = _effects(model, index + 1, cuts.narrower(deep), reference, probes)
        if index and cuts.worth_dropping({cut: effect.divergence for cut, effect in found.items()}):
            found |= _effects(model, index + 1, cuts.whole(), reference, probes)
        yield found


Cut = tuple[str, int]  # kind of unit and how many stay


@dataclass(frozen=True)
class _Effect:
    """What a cut does on the probes, nats per token."""

    divergence: float  # from the dense model's distributions
    loss: float  # cross entropy less the dense model's


def _sensitivity(effects: Mapping[Cut, _Effect], exchange: float) -> LayerSensitivity:
    losses = {cut: exchange * effect.divergence for cut, effect in effects.items()}
    return LayerSensitivity(
        {width: loss for (kind, width), loss in losses.items() if kind == "ffn"},
        {width: loss for (kind, width), loss in losses.items() if kind == "heads"},
        losses.get(("dropped", 0)),
    )


class _Cuts:
    """One layer's cuts: the probes' hidden states after the layer, (n, window, hidden), for each way to cut it."""

    def __init__(self, model: LayerwiseModel, index: int, batches: Iterator[Batch]) -> None:
        """Takes the layer's batches: moments of the windows', inputs and outputs of the probes'."""
        self.model, self.index = model, index
        self.widths = model.anatomy.layers[index]
        self.channels = Gram.empty(self.widths.ffn, halves=1)
        self.heads = Gram.empty(self.widths.heads * model.anatomy.head_dim, halves=1)
        probes: list[Batch] = []
        for batch in batches:
            if batch.dimension == PROBES:
                probes.append(batch)
                continue
            scale = scales(batch.norm)
            self.channels.add(batch.channels * scale, 0)
            self.heads.add(batch.heads * scale, 0)
        self.inner = torch.cat([batch.channels for batch in probes])
        self.read = torch.cat([batch.heads for batch in probes])
        self.window = probes[0].window
        prefix = model.anatomy.prefix(index)
        down, self.down_bias = self._matrix(prefix + DOWN)
        self.middle = torch.cat([batch.out for batch in probes]) - self._behind("ffn", self.inner @ down.T)
        self.before = self.middle  # of a layer without attention
        if self.widths.kv_heads:
            output, self.output_bias = self._matrix(prefix + OUTPUT)
            self.before = self.middle - self._behind("attention", self.read @ output.T)

    def _matrix(self, name: str) -> tuple[torch.Tensor, torch.Tensor | float]:
        weights, device = self.model.weights, self.model.device
        bias = weights[f"{name}.bias"].float().to(device) if f"{name}.bias" in weights else 0.0
        return weights[f"{name}.weight"].float().to(device), bias

    def narrower(self, deep: bool) -> dict[Cut, torch.Tensor]:
        """Fewer channels, and fewer kv heads, each refitted alone."""
        prefix = self.model.anatomy.prefix(self.index)
        states: dict[Cut, torch.Tensor] = {}
        full, gram = self._matrix(prefix + DOWN)[0].double().cpu(), self.channels
        levels = ffn_levels(self.widths, deep=deep)
        for width, kept in zip(levels, choose_columns(full, [gram.mean(0)], levels, steps=STEPS), strict=True):
            columns = torch.tensor(kept)
            fitted = refitted(full, gram, columns, RIDGE).to(self.model.device)
            states["ffn", width] = self.middle + self._behind("ffn", self.inner[:, columns] @ fitted.T)
        if self.widths.kv_heads:
            full, gram = self._matrix(prefix + OUTPUT)[0].double().cpu(), self.heads
            run, levels = full.shape[1] // self.widths.kv_heads, head_levels(self.widths)
            for width, groups in zip(levels, choose_groups(full, [gram.mean(0)], levels, run), strict=True):
                columns = group_columns(groups, run)
                fitted = refitted(full, gram, columns, RIDGE).to(self.model.device)
                added = self._behind("attention", self.read[:, columns] @ fitted.T)
                states["heads", width] = self._through_ffn(self.before + added)
        return self._windows(states)

    def whole(self) -> dict[Cut, torch.Tensor]:
        """No attention, and no layer at all."""
        states: dict[Cut, torch.Tensor] = {("dropped", 0): self.before}
        if self.widths.kv_heads:
            states["heads", 0] = self._through_ffn(self.before)
        return self._windows(states)

    def worth_dropping(self, losses: Mapping[Cut, float]) -> bool:
        """Whether a parameter of the narrowest attention measured is not far dearer than one of a half-cut FFN."""
        heads = {width: loss for (kind, width), loss in losses.items() if kind == "heads"}
        ffn = {width: loss for (kind, width), loss in losses.items() if kind == "ffn"}
        if not heads or not ffn:
            return True
        anatomy, width, half = self.model.anatomy, min(heads), sorted(ffn)[len(ffn) // 2]
        gone = (self.widths.kv_heads - width) * anatomy.head_unit_parameters(self.widths.queries_per_kv)
        return heads[width] / gone <= DEAR * ffn[half] / ((self.widths.ffn - half) * anatomy.ffn_unit_parameters())

    @torch.no_grad()
    def _through_ffn(self, states: torch.Tensor) -> torch.Tensor:
        with self.model.layer(self.index) as layer:
            return states + self.model.behind(layer, "ffn", self.model.ffn(layer, states))

    @torch.no_grad()
    def _behind(self, kind: Kind, product: torch.Tensor) -> torch.Tensor:
        """What goes into the residual stream where the last matrix gives ``product`` without its bias."""
        with self.model.layer(self.index) as layer:
            return self.model.behind(layer, kind, product + (self.down_bias if kind == "ffn" else self.output_bias))

    def _windows(self, states: Mapping[Cut, torch.Tensor]) -> dict[Cut, torch.Tensor]:
        return {key: value.unflatten(0, (-1, self.window)) for key, value in states.items()}


@torch.no_grad()
def _reference(model: LayerwiseModel, probes: np.ndarray) -> torch.Tensor:
    """The dense model's hidden states after the last layer, (n, window, hidden)."""
    states = model.embed(probes).to(model.device)
    for index in track(range(len(model.anatomy.layers)), "dense answers to the probes"):
        with model.layer(index) as layer:
            states = model.forward(layer, states)
    return states


@torch.no_grad()
def _effects(
    model: LayerwiseModel, start: int, cuts: Mapping[Cut, torch.Tensor], reference: torch.Tensor, probes: np.ndarray
) -> dict[Cut, _Effect]:
    """What each cut's states come to once they have gone through layers ``start`` on."""
    if not cuts:
        return {}
    states = torch.cat(list(cuts.values()))  # all of them through a layer at once
    for index in range(start, len(model.anatomy.layers)):
        with model.layer(index) as layer:
            states = model.forward(layer, states)
    variants = states.split(len(probes))
    divergences, losses = [0.0] * len(variants), [0.0] * len(variants)
    scored = torch.arange(0, probes.shape[1] - 1, EVERY)
    with model.head() as head:
        for number, ids in enumerate(torch.from_numpy(probes)):
            following = ids[scored + 1, None].to(reference.device)
            wanted = torch.log_softmax(head(reference[number, scored]), -1)
            shares = wanted.exp()
            entropy, before = float((shares * wanted).sum()), float(wanted.gather(1, following).sum())
            for place, variant in enumerate(variants):
                logits = head(variant[number, scored])
                normal = float(logits.logsumexp(-1).sum())
                losses[place] += before - float(logits.gather(1, following).sum()) + normal
                divergences[place] += entropy - float((shares * logits).sum()) + normal
    positions = len(probes) * len(scored)
    return {
        cut: _Effect(max(0.0, divergence) / positions, loss / positions)
        for cut, divergence, loss in zip(cuts, divergences, losses, strict=True)
    }
