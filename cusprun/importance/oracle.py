"""The leave-one-out oracle: each unit is really taken out and the model is run again. Exact, slow, the check on scores.

A unit's input to the matrix that reads it is set to zero and the rest of the model runs on from the layer's cached
input. Three changes come out for one ablation:

- block change: of what the FFN or the attention adds to the hidden state, relative to the norm of the layer's output;
  the root mean square over tokens. This is what Cus-Prun's closed form claims to be (definition 2 of the paper).
- layer change: of the layer's output in the same measure; for attention the FFN behind it has answered by then.
- loss change: mean nats per token with the unit gone minus with it, over every token that has a successor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Kind = Literal["ffn", "attention"]


@dataclass(frozen=True)
class Unit:
    """One FFN channel or one kv group of a layer."""

    kind: Kind
    index: int


@dataclass(frozen=True)
class Ablation:
    """What taking one unit out of a layer changed."""

    unit: Unit
    block_change: float
    layer_change: float
    loss_change: float | None  # nats per token; None where it was not asked for


def sample_units(channels: int, kv_heads: int, count: int, seed: int = 0) -> list[Unit]:
    """Every kv group of a layer, and channels drawn without repetition until there are ``count`` units."""
    groups = [Unit("attention", group) for group in range(kv_heads)]
    wanted = min(channels, max(0, count - kv_heads))
    drawn = np.random.default_rng(seed).choice(channels, wanted, replace=False)
    return groups + [Unit("ffn", int(channel)) for channel in sorted(drawn)]


def ablate(model: Any, windows: np.ndarray, layer: int, units: Sequence[Unit], *, loss: bool = True) -> list[Ablation]:
    """Takes each of ``units`` out of one layer of a transformers causal LM, alone, and puts it back.

    ``windows`` are token ids, (n, window) int64. One window's hidden states are held at a time; with ``loss`` every
    unit costs a run of the layers from this one on and of the output head, without it of this layer alone. Raises
    ValueError where losses are asked for and the layers attend in several ways (Gemma): they are run alike here.
    """
    if loss and len(set(getattr(model.config, "layer_types", None) or [None])) > 1:
        raise ValueError("losses are taken of models whose layers attend alike: ask for loss=False")
    block = model.model.layers[layer]
    block_squares = np.zeros(len(units))
    layer_squares = np.zeros(len(units))
    losses = np.zeros(len(units) + 1)  # the last is the whole model's
    predicted = 0
    with torch.no_grad():
        for window in torch.from_numpy(windows).to(model.device):
            states, settings = _input_of(model, window, layer)
            with _watched(block) as seen:
                out = block(states, **settings)
                parts = dict(seen)
            norm = out.norm(dim=-1)
            if loss:
                losses[-1] += _loss(model, out, layer, settings, window)
            for place, unit in enumerate(units):
                with _without(block, unit), _watched(block) as seen:
                    changed = block(states, **settings)
                block_squares[place] += _squares(seen[unit.kind] - parts[unit.kind], norm)
                layer_squares[place] += _squares(changed - out, norm)
                if loss:
                    losses[place] += _loss(model, changed, layer, settings, window)
            predicted += len(window) - 1
    differences = (losses[:-1] - losses[-1]) / max(1, predicted)
    return [
        Ablation(
            unit,
            float(np.sqrt(block_squares[place] / windows.size)),
            float(np.sqrt(layer_squares[place] / windows.size)),
            float(differences[place]) if loss else None,
        )
        for place, unit in enumerate(units)
    ]


def _squares(change: torch.Tensor, norm: torch.Tensor) -> float:
    """Σ ‖change‖² / ‖y‖² over the tokens."""
    return float((change.norm(dim=-1) / norm).double().square().sum())


def _input_of(model: Any, window: torch.Tensor, layer: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the model hands to one layer: hidden states, (1, window, hidden), and the keyword arguments beside them."""
    given: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(module: Any, arguments: tuple[torch.Tensor, ...], settings: dict[str, Any]) -> None:
        given.append((arguments[0], settings))
        raise _Reached

    handle = model.model.layers[layer].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.model(window.unsqueeze(0), use_cache=False)
    except _Reached:
        return given[0]
    finally:
        handle.remove()
    raise AssertionError(f"the model does not run its layer {layer}")


class _Reached(Exception):
    """The layer's input is known: the rest of the pass is not needed."""


@contextmanager
def _watched(block: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What the FFN and the attention of a decoder layer give while the block lasts, by kind."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, i, out, kind=kind: seen.__setitem__(kind, out))
        for kind, module in (("ffn", block.mlp.down_proj), ("attention", block.self_attn.o_proj))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without(block: Any, unit: Unit) -> Iterator[None]:
    """The layer with one unit's input to the matrix that reads it set to zero."""
    if unit.kind == "ffn":
        module, columns = block.mlp.down_proj, slice(unit.index, unit.index + 1)
    else:
        attention = block.self_attn
        run = attention.num_key_value_groups * attention.head_dim
        module, columns = attention.o_proj, slice(unit.index * run, (unit.index + 1) * run)

    def silence(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        inputs = arguments[0].clone()
        inputs[..., columns] = 0
        return (inputs,)

    handle = module.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def _loss(model: Any, states: torch.Tensor, layer: int, settings: dict[str, Any], window: torch.Tensor) -> float:
    """Σ −log p of the window's tokens but the first, the layers after ``layer`` run from ``states``."""
    for following in model.model.layers[layer + 1 :]:
        states = following(states, **settings)
    logits = model.lm_head(model.model.norm(states))[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
