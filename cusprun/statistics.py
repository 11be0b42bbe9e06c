"""The layer-by-layer pass: windows of text go in, second moments of the inputs of down_proj and o_proj come out.

For the relative moments each token's inputs are divided by the norm of the layer's output at that token, so that a
moment times the weights that read it is a relative change: without that a few tokens with massive activations decide
every sum. Where a norm stands behind the block (Gemma) they are divided by what it divides by as well. The plain
moments, and the gradients of :mod:`cusprun.gradients`, are taken where a criterion needs them. One decoder layer's
weights are held at a time and the hidden states are carried from layer to layer, so memory does not grow with depth.
Moments are sums with counts: those of two shards of text add up to those of both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cusprun.anatomy import Anatomy
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import folder_written_whole
from cusprun.layerwise import LayerwiseModel, check_window
from cusprun.moments import NEEDS, RELATIVE, GradientSums, LayerStatistics, Moments, Need, Statistics, UnitMoments
from cusprun.progress import track
from cusprun.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """What one layer did with one batch of tokens of one dimension; all float32, on the device."""

    dimension: str
    start: int  # number of the batch's first window within its dimension
    window: int  # tokens of each window
    channels: torch.Tensor  # inputs of down_proj, (tokens, channels)
    heads: torch.Tensor  # inputs of o_proj, (tokens, query heads * head_dim)
    out: torch.Tensor  # hidden state after the layer, (tokens, hidden)
    norm: torch.Tensor  # of the hidden state, the larger of before and after the layer, (tokens, 1)
    # what a norm behind the block divides by, (tokens, 1): the root of the mean square of down_proj's, o_proj's output
    channel_norm: torch.Tensor | None = None
    head_norm: torch.Tensor | None = None


def walk(
    folder: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    *,
    label: str,
    device: str = "cpu",
    batch_tokens: int = 2048,
    model: LayerwiseModel | None = None,
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Carries every dimension's windows through the model of ``folder``, one layer after the other, in float32.

    Yields each layer's number and its batches; taking the batches moves the hidden states on, so every layer's are to
    be taken to the end. ``windows`` maps each dimension to token ids, (n, window) int64; ``model`` is that of the
    folder where the caller has it already. Raises InvalidRequest where a window is longer than the model's sliding
    window or positions, Failed where a hidden state is not finite.
    """
    import torch

    if not any(len(ids) for ids in windows.values()):
        raise InvalidRequest("there is no text to take statistics of")
    layers = model or LayerwiseModel(folder, anatomy, device)
    hidden = {name: layers.embed(ids) for name, ids in windows.items()}
    check_window(layers.config, max(ids.shape[1] for ids in windows.values()))
    for index in track(range(len(anatomy.layers)), label):
        with torch.no_grad(), layers.layer(index) as layer:
            yield index, _batches(layer, layers, hidden, batch_tokens)
        for name, states in hidden.items():
            if not torch.isfinite(states[-1]).all():
                raise Failed(f"layer {index} of {folder} gives values that are not finite on the {name} text")


def _batches(layer: Any, layers: LayerwiseModel, hidden: dict[str, torch.Tensor], batch_tokens: int) -> Iterator[Batch]:
    """Takes ``hidden``, dimension to (n, window, hidden), through one layer in place."""
    import torch

    seen: dict[str, torch.Tensor] = {}

    norms: dict[str, torch.Tensor] = {}
    family, eps = layers.anatomy.family, layers.anatomy.norm_eps

    def watch(name: str) -> Any:
        behind = family.ffn_norm_behind if name == "ffn" else family.attention_norm_behind

        def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen[name] = inputs[0].flatten(0, 1).float()
            if behind is not None:
                norms[name] = (output.flatten(0, 1).float().square().mean(1, keepdim=True) + eps).sqrt()

        return hook

    handles = [layer.mlp.down_proj.register_forward_hook(watch("ffn"))]
    if attention := getattr(layer, "self_attn", None):
        handles.append(attention.o_proj.register_forward_hook(watch("attention")))
    try:
        for name, states in hidden.items():
            step = max(1, batch_tokens // states.shape[1])
            for start in range(0, len(states), step):
                batch = states[start : start + step].to(layers.device)
                norm = batch.norm(dim=-1, keepdim=True)
                out = layers.forward(layer, batch)
                norm = torch.maximum(norm, out.norm(dim=-1, keepdim=True)).flatten(0, 1)
                states[start : start + step] = out.to(states.device)
                heads = seen["attention"] if attention else seen["ffn"][:, :0]  # a layer without attention reads none
                flat = out.flatten(0, 1)
                yield Batch(
                    name, start, states.shape[1], seen["ffn"], heads, flat, norm,
                    norms.get("ffn"), norms.get("attention"),
                )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()


def collect(
    folder: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    *,
    needs: Collection[Need] = RELATIVE,
    gradient_windows: int | None = None,
    device: str = "cpu",
    batch_tokens: int = 2048,
) -> Statistics:
    """What :func:`stream` yields, held together."""
    return list(
        stream(
            folder, anatomy, windows,
            needs=needs, gradient_windows=gradient_windows, device=device, batch_tokens=batch_tokens,
        )
    )  # fmt: skip


def stream(
    folder: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    *,
    needs: Collection[Need] = RELATIVE,
    gradient_windows: int | None = None,
    device: str = "cpu",
    batch_tokens: int = 2048,
) -> Iterator[dict[str, LayerStatistics]]:
    """Statistics of one layer after the other, by dimension; ``needs`` says which, see :class:`Criterion`.

    Moments take one pass, none where only gradients or nothing is needed. ``gradient_windows`` bounds the windows of
    each dimension that gradients are taken of. Takes and raises what :func:`walk` does, and Failed where a loss is not
    finite.
    """
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"there are no statistics called {', '.join(sorted(unknown))}; there are {', '.join(NEEDS)}")
    if "relative" in needs or "plain" in needs:
        layers = _moments(folder, anatomy, windows, needs, device, batch_tokens)
    else:
        layers = ({name: LayerStatistics() for name, ids in windows.items() if len(ids)} for _ in anatomy.layers)
    if "gradients" not in needs:
        yield from layers
        return
    from cusprun.gradients import collect_gradients

    found = collect_gradients(folder, anatomy, windows, most=gradient_windows, device=device)
    for layer, sums in zip(layers, found, strict=True):
        yield {name: replace(part, gradients=sums[name]) for name, part in layer.items()}


def _moments(
    folder: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    needs: Collection[Need],
    device: str,
    batch_tokens: int,
) -> Iterator[dict[str, LayerStatistics]]:
    passes = walk(
        folder, anatomy, windows, label="statistics, layer by layer", device=device, batch_tokens=batch_tokens
    )
    for index, batches in passes:
        layer: dict[str, LayerStatistics] = {}
        for batch in batches:
            part = LayerStatistics(
                _relative(batch, anatomy.layers[index].kv_heads) if "relative" in needs else None,
                _plain(batch) if "plain" in needs else None,
            )
            layer[batch.dimension] = layer[batch.dimension] + part if batch.dimension in layer else part
        yield layer


def _relative(batch: Batch, kv_heads: int) -> UnitMoments:
    """Moments of the inputs over the norm of the layer's output at their token, and over what a norm behind takes."""
    import torch

    scale = batch.out.norm(dim=1, keepdim=True).clamp_min(torch.finfo(batch.out.dtype).tiny)
    channels, heads = batch.channels / scale, batch.heads / scale
    if batch.channel_norm is not None:
        channels = channels / batch.channel_norm
    if batch.head_norm is not None:
        heads = heads / batch.head_norm
    return UnitMoments(Moments.of(channels, channels.shape[1]), Moments.of(heads, kv_heads))


def _plain(batch: Batch) -> UnitMoments:
    """Diagonal moments of the inputs as they are."""
    return UnitMoments(*(Moments.of(inputs, inputs.shape[1]) for inputs in (batch.channels, batch.heads)))


def save_statistics(statistics: Iterable[Mapping[str, LayerStatistics]], folder: Path) -> None:
    """Writes one safetensors file a layer as the layers come; the folder appears whole or not at all."""
    import torch
    from safetensors.torch import save_file

    with folder_written_whole(folder) as part:
        for index, layer in enumerate(statistics):
            tensors = {}
            for dimension, seen in layer.items():
                tensors[f"{dimension}/"] = torch.zeros(0)  # there even where no part was asked for
                tensors |= {f"{dimension}/{key}": tensor.contiguous() for key, tensor in _flatten(seen).items()}
            save_file(tensors, part / f"{index:05d}.safetensors")


def load_statistics(folder: Path) -> Statistics:
    """What :func:`save_statistics` wrote; a layer is read when it is asked for and never kept."""
    return _Stored(sorted(folder.glob("*.safetensors")))


class _Stored(Sequence[Mapping[str, LayerStatistics]]):
    """Statistics on disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, LayerStatistics]: ...

    @overload
    def __getitem__(self, index: slice) -> _Stored: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, LayerStatistics] | _Stored:
        if isinstance(index, slice):
            return _Stored(self.paths[index])
        file = TensorFile(self.paths[index])
        grouped: dict[str, dict[str, torch.Tensor]] = {}
        for name in file:
            dimension, key = name.split("/")
            grouped.setdefault(dimension, {})[key] = file[name]
        return {dimension: _read_layer(values) for dimension, values in sorted(grouped.items())}


def _read_layer(values: Mapping[str, torch.Tensor]) -> LayerStatistics:
    gradients = None
    if "gradients.count" in values:
        sums: dict[str, Any] = {field.name: values[f"gradients.{field.name}"] for field in fields(GradientSums)}
        gradients = GradientSums(**{**sums, "count": float(sums["count"])})
    return LayerStatistics(_read_units(values, "relative"), _read_units(values, "plain"), gradients)


def _read_units(values: Mapping[str, Any], part: str) -> UnitMoments | None:
    if f"{part}.ffn.count" not in values:
        return None
    ffn, attention = (
        Moments(float(values[f"{place}.count"]), values[f"{place}.first"], values[f"{place}.second"])
        for place in (f"{part}.ffn", f"{part}.attention")
    )
    return UnitMoments(ffn, attention)


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Tensors and counts of nested statistics by their dotted path."""
    import torch

    if value is None:
        return {}
    if not is_dataclass(value):
        return {path: torch.as_tensor(value, dtype=torch.float64)}
    flat: dict[str, Any] = {}
    for field in fields(value):
        flat |= _flatten(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    return flat
