"""Pico models in every form that the GGUF export must take, and text to compare them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import cusprun  # noqa: F401  (registers the per-layer model classes)
from tests.pico import SENTENCES, save_model

# Widths of their own in every layer, with another ratio of query to kv heads in each.
PER_LAYER: dict[str, Any] = {
    "layer_intermediate_sizes": [96, 160, 64],
    "layer_num_attention_heads": [4, 2, 3],
    "layer_num_key_value_heads": [2, 2, 1],
    "intermediate_size": 160,
}
PER_LAYER_MHA = {
    **PER_LAYER,
    "layer_num_attention_heads": [4, 2, 3],
    "layer_num_key_value_heads": [4, 2, 3],
    "num_key_value_heads": 4,
}

# Layers without attention in the middle and at the end, beside ones of the same width with it.
WITHOUT_ATTENTION: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_intermediate_sizes": [96, 128, 96, 32, 64],
    "layer_num_attention_heads": [4, 0, 2, 0, 0],
    "layer_num_key_value_heads": [2, 0, 1, 0, 0],
    "intermediate_size": 128,
}


def make(
    folder: Path, *, layout: str = "uniform", attention: str = "gqa", family: str = "llama", **settings: Any
) -> Path:
    """A pico model folder; ``layout`` uniform, per-layer or without-attention, ``attention`` gqa or mha."""
    sizes: dict[str, Any] = {}
    if layout == "without-attention":
        family, sizes = f"cusprun_{family}", dict(WITHOUT_ATTENTION)
    elif layout == "per-layer":
        family = f"cusprun_{family}"
        sizes = dict(PER_LAYER_MHA if attention == "mha" else PER_LAYER)
    elif attention == "mha":
        sizes = {"num_key_value_heads": 4}
    return save_model(folder, family, **{**sizes, **settings})


def windows(folder: Path, count: int = 3, length: int = 64) -> np.ndarray:
    """Token windows (count, length) of the sentences that the pico tokenizer was trained on."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("\n".join(SENTENCES * 6), add_special_tokens=False)["input_ids"]
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
