"""Least-squares refit: what is left of down_proj and o_proj moves to where it makes up for what goes.

A second pass forms, layer by layer, H = E[x xᵀ] of the inputs of the two matrices on the calibration text. With H the
units of a layer are chosen by optimal brain surgeon (:mod:`cusprun.surgeon`), as many as the widths say, and the
kept columns S become the least-squares optimum W_S = (C_S + λ W[:, S]) (H_SS + λI)⁻¹ with C = E[t xᵀ] for a target t.

parallel    each layer for itself: x is the dense model's and t = W x.
sequential  x comes from the compacted prefix, and t = (1 - α) W x + α t*, where t* would give the residual stream the
            dense model's values again: α = 0 keeps the layer's function on its new inputs, α = 1 repairs all that the
            layers before it broke, and overfits. Where a norm stands behind the matrix (Gemma), no output before it
            gives those values: t* is what the matrix gives in the dense model.

The ridge λ and α are those that, fitted on either half of the windows, leave the least error on the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.arithmetic import bfloat16_products
from cusprun.checkpoint import write_weights
from cusprun.errors import Failed
from cusprun.files import folder_written_whole
from cusprun.gram import Gram
from cusprun.layerwise import Kind, LayerwiseModel, check_window
from cusprun.least_squares import fit
from cusprun.memory import HELD_BYTES
from cusprun.plan import LayerPlan, Plan, make_plan
from cusprun.progress import track
from cusprun.surgeon import choose_columns, choose_groups

DOWN, OUTPUT = "mlp.down_proj", "self_attn.o_proj"
BATCH_TOKENS = 4096
MATRICES = {"attention": OUTPUT, "ffn": DOWN}

Action = Literal["keep", "leave out", "fit"]
Form = Literal["parallel", "sequential"]
Combine = Literal["intersection", "mixture", "max"]


def refit(
    dense: Path,
    anatomy: Anatomy,
    widths: Sequence[LayerWidths | None],
    windows: Mapping[str, np.ndarray],
    out: Path,
    *,
    form: Form = "sequential",
    combine: Combine = "mixture",
    device: str = "cpu",
) -> Plan:
    """Writes the new matrices of every layer that is cut to the folder ``out``, whole or not at all; returns the plan.

    ``widths`` has an entry for each dense layer, None where the whole layer goes. ``windows`` maps each dimension to
    token ids, (n, window); the tokens count alike. With ``combine`` other than "mixture" every dimension judges which
    units go; the fit is to the mixture always. One layer's weights and moments are in memory at a time. Raises
    InvalidRequest where the windows are too long for the model, Failed where a hidden state is not finite.
    """
    chosen: list[LayerPlan] = []
    with folder_written_whole(out) as part:
        work = _Refit(LayerwiseModel(dense, anatomy, device, fast=True), widths, windows, form, combine)
        write_weights(part, work.run(chosen), work.sizes())
    return make_plan(anatomy, tuple(chosen))


@dataclass
class _Streams:
    """Hidden states of one dimension's windows, (n, window, hidden): the dense model's, and the compacted one's."""

    dense: torch.Tensor
    compact: torch.Tensor  # the same object as ``dense`` until the first cut, and always in the parallel form
    held: list[torch.Tensor] = field(default_factory=list)


class _Refit:
    """One way down the layers."""

    def __init__(
        self,
        model: LayerwiseModel,
        widths: Sequence[LayerWidths | None],
        windows: Mapping[str, np.ndarray],
        form: Form,
        combine: Combine,
    ) -> None:
        self.model, self.widths, self.form, self.combine = model, widths, form, combine
        check_window(model.config, max(ids.shape[1] for ids in windows.values()))
        self.streams: dict[str, _Streams] = {}
        for name, ids in windows.items():
            states = model.embed(ids).to(model.device)
            self.streams[name] = _Streams(states, states)
        self.tokens = sum(ids.size for ids in windows.values())
        self.parts = self._plan_parts()

    def _plan_parts(self) -> list[dict[Kind, Action]]:
        """What happens to attention and FFN of every layer.

        Parts that keep all of their inputs stay as they are: fitting those too, to repair what was cut before them,
        takes a third more time for a fiftieth of the loss.
        """
        found: list[dict[Kind, Action]] = []
        for before, after in zip(self.model.anatomy.layers, self.widths, strict=True):
            layer: dict[Kind, Action] = {}
            for kind in ("attention", "ffn"):
                full = before.kv_heads if kind == "attention" else before.ffn
                left = 0 if after is None else after.kv_heads if kind == "attention" else after.ffn
                if full:
                    layer[kind] = "leave out" if not left else "fit" if left < full else "keep"
            found.append(layer)
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of every matrix that is written, by name, in order."""
        sizes = {}
        for index, (parts, after) in enumerate(zip(self.parts, self.widths, strict=True)):
            prefix, rows = self.model.anatomy.prefix(index), self.model.anatomy.hidden_size * 4
            for kind, action in parts.items():
                if action == "fit" and after is not None:
                    columns = after.heads * self.model.anatomy.head_dim if kind == "attention" else after.ffn
                    sizes[f"{prefix}{MATRICES[kind]}.weight"] = rows * columns
        return sizes

    @torch.no_grad()
    def run(self, chosen: list[LayerPlan]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the new matrices by name, float32, and appends what each layer keeps to ``chosen``."""
        for index in track(range(len(self.widths)), f"refit, {self.form}, layer by layer"):
            with bfloat16_products(self.model.device):
                yield from self._layer(index, chosen)
            for name, streams in self.streams.items():
                if not torch.isfinite(streams.compact[-1]).all():
                    raise Failed(f"layer {index} gives values that are not finite on the {name} text")

    def _layer(self, index: int, chosen: list[LayerPlan]) -> Iterator[tuple[str, torch.Tensor]]:
        before, after = self.model.anatomy.layers[index], self.widths[index]
        run = before.queries_per_kv * self.model.anatomy.head_dim
        kept: dict[Kind, list[int]] = {"attention": list(range(before.kv_heads)), "ffn": list(range(before.ffn))}
        for kind, action in self.parts[index].items():
            if action == "keep":
                with self._part(index, kind) as part:
                    self._keep(part)
                continue
            if action == "leave out" or after is None:
                kept[kind] = []
                with self._part(index, kind) as part:
                    self._leave_out(part)
                continue
            with self._part(index, kind) as part:
                matrix = part.matrix
                moments = self._moments(part, matrix.shape[1])
            judges, agreement = (gram.mean(0, 1) for gram in moments.values()), self._agreement()
            if kind == "attention":
                kept[kind] = choose_groups(matrix, judges, [after.kv_heads], run, agreement)[0]
                columns = group_columns(kept[kind], run)
            else:
                kept[kind] = choose_columns(matrix, judges, [after.ffn], agreement)[0]
                columns = torch.tensor(kept[kind])
            fitted = fit(matrix, _total(moments), columns)
            yield f"{self.model.anatomy.prefix(index)}{MATRICES[kind]}.weight", fitted
            if self.form == "sequential":
                with self._part(index, kind) as part:
                    self._replace(part, columns, fitted)
        chosen.append(LayerPlan(tuple(kept["ffn"]), tuple(kept["attention"])))

    @contextmanager
    def _part(self, index: int, kind: Kind) -> Iterator[_Part]:
        """The part with its weights; these leave memory after, before moments are worked on."""
        with self.model.layer(index) as layer:
            yield _Part(self.model, layer, kind)

    # the three things that can happen to a part of a layer ------------------------------------------------------------

    def _keep(self, part: _Part) -> None:
        """Both streams go through the part as it is."""
        for streams in self.streams.values():
            for states in {id(states): states for states in (streams.dense, streams.compact)}.values():
                for batch in _batches(states):
                    batch += part.added(batch)

    def _leave_out(self, part: _Part) -> None:
        """The dense stream goes through the part, the compacted one passes by."""
        for streams in self.streams.values():
            if self.form == "sequential" and streams.compact is streams.dense:
                streams.compact = streams.dense.clone()
            for batch in _batches(streams.dense):
                batch += part.added(batch)

    def _moments(self, part: _Part, columns: int) -> dict[str, Gram]:
        """Takes the dense stream through the part, and the moments of the compacted stream's inputs with targets.

        The inputs are held for :meth:`_replace` where they are few.
        """
        sequential = self.form == "sequential"
        rows = self.model.anatomy.hidden_size if sequential else None
        moments: dict[str, Gram] = {}
        hold = sequential and self.tokens * columns * 4 + 6 * columns**2 * 8 <= HELD_BYTES
        for name, streams in self.streams.items():
            gram = moments.setdefault(name if self.combine != "mixture" else "mixture", Gram.empty(columns, rows))
            apart = streams.compact is not streams.dense
            if sequential and not apart:
                streams.compact = streams.dense.clone()
            window, start = streams.dense.shape[1], 0
            for dense, compact in zip(_batches(streams.dense), _batches(streams.compact), strict=True):
                inputs, given = part(dense)
                dense += part.behind(given)
                if apart:
                    inputs, _ = part(compact)
                target = given if part.normed else dense - compact
                gram.add_windows(inputs, start, window, (target - part.bias).flatten(0, 1) if sequential else None)
                start += len(dense)
                if hold:
                    streams.held.append(inputs)
        return moments

    def _replace(self, part: _Part, columns: torch.Tensor, fitted: torch.Tensor) -> None:
        """Takes the compacted stream through the part with only the kept columns, at their new values."""
        fitted = fitted.to(self.model.device)
        for streams in self.streams.values():
            held = iter(streams.held)
            for compact in _batches(streams.compact):
                inputs = next(held, None)
                if inputs is None:
                    inputs, _ = part(compact)
                compact += part.behind(inputs[:, columns] @ fitted.T + part.bias).unflatten(0, compact.shape[:2])
            streams.held = []

    def _agreement(self) -> Literal["intersection", "max"]:
        return "max" if self.combine == "max" else "intersection"


class _Part:
    """Attention or FFN of a loaded layer: hidden states in; what its last matrix takes and gives out.

    ``normed`` says that what it gives is normed before it is added to the residual stream.
    """

    def __init__(self, model: LayerwiseModel, layer: Any, kind: Kind) -> None:
        self.model, self.layer, self.kind = model, layer, kind
        last = layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj
        self.bias = 0.0 if last.bias is None else last.bias
        family = model.anatomy.family
        self.normed = (family.attention_norm_behind if kind == "attention" else family.ffn_norm_behind) is not None
        self._last = last

    @property
    def matrix(self) -> torch.Tensor:
        """The last matrix, (hidden, columns) float64 on the CPU."""
        weight: torch.Tensor = self._last.weight
        return weight.double().cpu()

    def __call__(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``states`` is (n, window, hidden); returns (n * window, columns) and (n, window, hidden)."""
        seen: list[torch.Tensor] = []
        handle = self._last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).float()))
        try:
            run = self.model.attention if self.kind == "attention" else self.model.ffn
            given = run(self.layer, states)
        finally:
            handle.remove()
        return seen[0], given.float()

    def added(self, states: torch.Tensor) -> torch.Tensor:
        """What goes into the residual stream at ``states``, (n, window, hidden)."""
        return self.behind(self(states)[1])

    def behind(self, given: torch.Tensor) -> torch.Tensor:
        """What goes into it where the last matrix gives ``given``, (…, hidden)."""
        return self.model.behind(self.layer, self.kind, given)


def _batches(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of some windows at a time."""
    step = max(1, BATCH_TOKENS // states.shape[1])
    for start in range(0, len(states), step):
        yield states[start : start + step]


def _total(moments: Mapping[str, Gram]) -> Gram:
    first, *others = moments.values()
    for other in others:
        first = first + other
    return first


def group_columns(groups: Sequence[int], run: int) -> torch.Tensor:
    """Columns of o_proj that belong to kv groups of ``run`` columns each."""
    return torch.cat([torch.arange(group * run, (group + 1) * run) for group in groups])
