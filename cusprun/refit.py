"""Least-squares refit: what is left of down_proj and o_proj moves to where it makes up for what goes.

A second pass forms, layer by layer, H = E[x xᵀ] of the inputs of the two matrices on the calibration text. With H the
units of a layer are chosen by optimal brain surgeon (:mod:`cusprun.surgeon`), as many as the widths say, and the
kept columns S become the least-squares optimum W_S = (C_S + λ W[:, S]) (H_SS + λI)⁻¹ with C = E[t xᵀ] for a target t.

parallel    each layer for itself: x is the dense model's and t = W x.
sequential  x comes from the compacted prefix, and t = (1 - α) W x + α t*, where t* would give the residual stream the
            dense model's values again: α = 0 keeps the layer's function on its new inputs, α = 1 repairs all that the
            layers before it broke, and overfits. Where a norm stands behind the matrix (Gemma), no output before it
            gives those values: t* is what the matrix gives in the dense model.
joint       sequential, and where many channels of an FFN go what is left of gate_proj and up_proj moves towards t too
            (:mod:`cusprun.gauss_newton`), after which down_proj is fitted once more.

The ridge λ and α are those that, fitted on either half of the windows, leave the least error on the other. What tokens
are to that error, and which short windows join the given ones, says :mod:`cusprun.sinks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.arithmetic import bfloat16_products
from cusprun.checkpoint import write_weights
from cusprun.errors import Failed
from cusprun.files import folder_written_whole
from cusprun.gauss_newton import GatedFfn, Windows
from cusprun.gram import Gram
from cusprun.joint import fit_jointly
from cusprun.layerwise import Kind, LayerwiseModel, check_window
from cusprun.least_squares import fit
from cusprun.memory import HELD_BYTES
from cusprun.part import Part, batches
from cusprun.plan import LayerPlan, Plan, make_plan
from cusprun.progress import track
from cusprun.sinks import scales, starts
from cusprun.surgeon import choose_columns, choose_groups

DOWN, OUTPUT = "mlp.down_proj", "self_attn.o_proj"
GATE, UP = "mlp.gate_proj", "mlp.up_proj"
MATRICES = {"attention": OUTPUT, "ffn": DOWN}
JOINT_BELOW = 7 / 8  # of an FFN's channels that stay: with more of them down_proj alone makes up for the others

Action = Literal["keep", "leave out", "fit"]
Form = Literal["joint", "sequential", "parallel"]
Combine = Literal["intersection", "mixture", "max"]


def refit(
    dense: Path,
    anatomy: Anatomy,
    widths: Sequence[LayerWidths | None],
    windows: Mapping[str, np.ndarray],
    out: Path,
    *,
    form: Form = "joint",
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
    """Hidden states of a dimension's windows of one length, (n, window, hidden): the dense model's, the compacted's."""

    name: str  # of the dimension
    dense: torch.Tensor
    compact: torch.Tensor  # the same object as ``dense`` until the first cut, and always in the parallel form
    held: list[torch.Tensor] = field(default_factory=list)  # inputs of the matrix at hand, of the compacted stream
    given: list[torch.Tensor] = field(default_factory=list)  # what all of the FFN gives there, (n, window, hidden)
    wanted: list[torch.Tensor] = field(default_factory=list)  # and in the dense model, where that is the target
    scales: list[torch.Tensor] = field(default_factory=list)  # of each token's error there, (n, window, 1)


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
        self.streams: list[_Streams] = []
        for name, ids in windows.items():
            for some in (ids, starts(ids)):
                states = model.embed(some).to(model.device)
                self.streams += [_Streams(name, states, states)] if len(some) else []
        self.tokens = sum(streams.dense.shape[:2].numel() for streams in self.streams)
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
        sizes: dict[str, int] = {}
        for index, (parts, after) in enumerate(zip(self.parts, self.widths, strict=True)):
            prefix, rows = self.model.anatomy.prefix(index), self.model.anatomy.hidden_size * 4
            for kind, action in parts.items():
                if action == "fit" and after is not None:
                    columns = after.heads * self.model.anatomy.head_dim if kind == "attention" else after.ffn
                    names = [GATE, UP, DOWN] if kind == "ffn" and self._is_joint(index) else [MATRICES[kind]]
                    sizes |= {f"{prefix}{name}.weight": rows * columns for name in names}
        return sizes

    def _is_joint(self, index: int) -> bool:
        """Whether gate and up of the layer move too."""
        before, after = self.model.anatomy.layers[index], self.widths[index]
        return self.form == "joint" and after is not None and 0 < after.ffn < JOINT_BELOW * before.ffn

    @torch.no_grad()
    def run(self, chosen: list[LayerPlan]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the new matrices by name, float32, and appends what each layer keeps to ``chosen``."""
        for index in track(range(len(self.widths)), f"refit, {self.form}, layer by layer"):
            with bfloat16_products(self.model.device):
                yield from self._layer(index, chosen)
            for streams in self.streams:
                if not torch.isfinite(streams.compact[-1]).all():
                    raise Failed(f"layer {index} gives values that are not finite on the {streams.name} text")

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
            joint = kind == "ffn" and self._is_joint(index)
            with self._part(index, kind) as part:
                matrix = part.matrix
                moments = self._moments(part, matrix.shape[1], joint)
            judges, agreement = (gram.mean(0, 1) for gram in moments.values()), self._agreement()
            if kind == "attention":
                kept[kind] = choose_groups(matrix, judges, [after.kv_heads], run, agreement)[0]
                columns = group_columns(kept[kind], run)
            else:
                kept[kind] = choose_columns(matrix, judges, [after.ffn], agreement)[0]
                columns = torch.tensor(kept[kind])
            total = _total(moments)
            moments.clear()
            fitted, alpha = fit(matrix, total, columns)
            del matrix
            prefix = self.model.anatomy.prefix(index)
            if joint:
                with self._part(index, kind) as part:
                    ffn = self._improve(part, part.narrowed(columns, fitted), alpha)
                    self._replace_ffn(part, ffn)
                for name, tensor in ((GATE, ffn.gate), (UP, ffn.up), (DOWN, ffn.down)):
                    yield f"{prefix}{name}.weight", tensor.cpu()
                continue
            yield f"{prefix}{MATRICES[kind]}.weight", fitted
            if self.form != "parallel":
                with self._part(index, kind) as part:
                    self._replace(part, columns, fitted)
        chosen.append(LayerPlan(tuple(kept["ffn"]), tuple(kept["attention"])))

    @contextmanager
    def _part(self, index: int, kind: Kind) -> Iterator[Part]:
        """The part with its weights; these leave memory after, before moments are worked on."""
        with self.model.layer(index) as layer:
            yield Part(self.model, layer, kind)

    # the three things that can happen to a part of a layer ------------------------------------------------------------

    def _keep(self, part: Part) -> None:
        """Both streams go through the part as it is."""
        for streams in self.streams:
            for states in {id(states): states for states in (streams.dense, streams.compact)}.values():
                for batch in batches(states):
                    batch += part.added(batch)

    def _leave_out(self, part: Part) -> None:
        """The dense stream goes through the part, the compacted one passes by."""
        for streams in self.streams:
            if self.form != "parallel" and streams.compact is streams.dense:
                streams.compact = streams.dense.clone()
            for batch in batches(streams.dense):
                batch += part.added(batch)

    def _moments(self, part: Part, columns: int, joint: bool) -> dict[str, Gram]:
        """Takes the dense stream through the part, and the moments of the compacted stream's inputs with targets.

        What the part gives is held where ``joint``, else the inputs, for :meth:`_replace`, where they are few.
        """
        sequential = self.form != "parallel"
        rows = self.model.anatomy.hidden_size if sequential else None
        moments: dict[str, Gram] = {}
        hold = sequential and not joint and self.tokens * columns * 4 + 6 * columns**2 * 8 <= HELD_BYTES
        for streams in self.streams:
            gram = moments.setdefault(
                streams.name if self.combine != "mixture" else "mixture", Gram.empty(columns, rows)
            )
            apart = streams.compact is not streams.dense
            if sequential and not apart:
                streams.compact = streams.dense.clone()
            window, start = streams.dense.shape[1], 0
            for dense, compact in zip(batches(streams.dense), batches(streams.compact), strict=True):
                before = dense.norm(dim=-1, keepdim=True)
                inputs, given = part(dense)
                dense += part.behind(given)
                scale = scales(torch.maximum(before, dense.norm(dim=-1, keepdim=True)))
                target = given
                if apart:
                    inputs, given = part(compact)
                if joint:
                    streams.scales.append(scale)
                    streams.given.append(given - part.bias)
                    streams.wanted += [target - part.bias] if part.normed and apart else []
                if not part.normed:
                    target = dense - compact
                wanted = ((target - part.bias) * scale).flatten(0, 1) if sequential else None
                gram.add_windows(inputs * scale.flatten(0, 1), start, window, wanted)
                start += len(dense)
                if hold:
                    streams.held.append(inputs)
        return moments

    def _replace(self, part: Part, columns: torch.Tensor, fitted: torch.Tensor) -> None:
        """Takes the compacted stream through the part with only the kept columns, at their new values."""
        fitted = fitted.to(self.model.device)
        for streams in self.streams:
            held = iter(streams.held)
            for compact in batches(streams.compact):
                inputs = next(held, None)
                if inputs is None:
                    inputs, _ = part(compact)
                compact += part.behind(inputs[:, columns] @ fitted.T + part.bias).unflatten(0, compact.shape[:2])
            streams.held = []

    def _improve(self, part: Part, ffn: GatedFfn, alpha: float) -> GatedFfn:
        """The narrowed FFN with gate, up and down nearer to (1 - α) W x + α t*; as it was where that does not help.

        What :meth:`_moments` held becomes the targets.
        """
        for streams in self.streams:
            for number, (dense, compact) in enumerate(
                zip(batches(streams.dense), batches(streams.compact), strict=True)
            ):
                if not part.normed:
                    streams.given[number].lerp_(dense - compact - part.bias, alpha)
                elif streams.wanted:  # else both streams are one up to here, and so is what the FFN gives
                    streams.given[number].lerp_(streams.wanted[number], alpha)
            streams.wanted = []

        def windows() -> Iterator[Windows]:
            for streams in self.streams:
                for compact, target, scale in zip(batches(streams.compact), streams.given, streams.scales, strict=True):
                    yield Windows(compact, target, scale, part.read)

        better = fit_jointly(ffn, windows)
        for streams in self.streams:
            streams.given, streams.scales = [], []
        return better

    def _replace_ffn(self, part: Part, ffn: GatedFfn) -> None:
        """Takes the compacted stream through the part with the narrowed FFN in place of its own."""
        for streams in self.streams:
            for compact in batches(streams.compact):
                compact += part.behind(ffn(part.read(compact)) + part.bias)

    def _agreement(self) -> Literal["intersection", "max"]:
        return "max" if self.combine == "max" else "intersection"


def _total(moments: Mapping[str, Gram]) -> Gram:
    first, *others = moments.values()
    for other in others:
        first = first + other
    return first


def group_columns(groups: Sequence[int], run: int) -> torch.Tensor:
    """Columns of o_proj that belong to kv groups of ``run`` columns each."""
    return torch.cat([torch.arange(group * run, (group + 1) * run) for group in groups])
