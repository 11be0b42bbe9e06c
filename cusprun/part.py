"""Attention or FFN of a loaded layer: hidden states in, what its last matrix reads and gives out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cusprun.gauss_newton import GatedFfn
from cusprun.layerwise import Kind, LayerwiseModel

BATCH_TOKENS = 4096


class Part:
    """Attention or FFN of a loaded layer.

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

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """What gate and up of an FFN read at ``states``, (…, hidden)."""
        found: torch.Tensor = self.layer.get_submodule(self.model.anatomy.family.ffn_norm)(states)
        return found

    def narrowed(self, kept: torch.Tensor, down: torch.Tensor) -> GatedFfn:
        """The FFN with the kept channels alone and ``down``, (hidden, kept) float32, in place of its own."""
        mlp = self.layer.mlp
        gate, up = mlp.gate_proj, mlp.up_proj

        def bias(linear: Any) -> torch.Tensor | None:
            return None if linear.bias is None else linear.bias[kept]

        down = down.to(self.model.device)
        return GatedFfn(gate.weight[kept], up.weight[kept], down, bias(gate), bias(up), mlp.act_fn)


def batches(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of some windows at a time of (n, window, hidden)."""
    step = max(1, BATCH_TOKENS // states.shape[1])
    for start in range(0, len(states), step):
        yield states[start : start + step]
