"""What can be told of a dense model from its headers alone: family, sizes, units, and what each export holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from cusprun.checkpoint import is_stock
from cusprun.dense import read_sizes
from cusprun.layouts import describe_exports


def describe_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """What `inspect` prints: family, sizes, the units that may go, what each export holds, and every layer."""
    sizes = read_sizes(model, revision, convertible=False)
    anatomy = sizes.anatomy
    return {
        "model": model,
        "family": sizes.original or anatomy.family.name,
        **({"read_as": anatomy.family.name} if sizes.original else {}),
        "parameters": anatomy.parameters,
        "macs_per_token": anatomy.macs_per_token,
        "hidden_size": anatomy.hidden_size,
        "head_dim": anatomy.head_dim,
        "vocab_size": anatomy.vocab_size,
        "tied_embeddings": anatomy.tied,
        "biases": anatomy.attention_bias or anatomy.mlp_bias,
        "activation": anatomy.family.activation,
        "qk_norms": anatomy.family.qk_norms,
        "norm_eps": anatomy.norm_eps,
        "layout": "uniform" if is_stock(anatomy) else "per-layer",
        "units": ["ffn channel", "kv group", "attention block", "layer", "vocabulary row"],
        "exports": describe_exports(anatomy),
        "layers": [
            {"layer": index, **asdict(widths), **asdict(attention)}
            for index, (widths, attention) in enumerate(zip(anatomy.layers, anatomy.attention, strict=True))
        ],
    }


def as_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What :func:`describe_model` returns as lines to print."""
    for key, value in found.items():
        if key == "exports":
            for export, layouts in value.items():
                held = "; ".join(f"{layout}: {host}" for layout, host in layouts.items() if host)
                yield f"{export:<16} {held or 'none'}"
        elif key != "layers":
            yield f"{key:<16} {', '.join(value) if isinstance(value, list) else value}"
    for layer in found["layers"]:
        line = f"layer {layer['layer']:>3}        ffn {layer['ffn']:>6}   heads {layer['heads']:>3}   "
        line += f"kv heads {layer['kv_heads']:>3}" + ("" if layer["rotates"] else "   no rotation")
        yield line + (f"   window {layer['window']}" if layer["window"] else "")
