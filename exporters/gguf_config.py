"""Numbers of config.json that only the export reads, checked: what transformers would not load must not crash here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cusprun.anatomy import family_of, read_config
from cusprun.as_llama import READ
from cusprun.checkpoint import Weights
from cusprun.errors import InvalidRequest

LARGEST = 2**31 - 1  # what llama.cpp counts with


def read_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0 and at most LARGEST. Raises InvalidRequest naming the key where it is none."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise InvalidRequest(f"config.json: {key} must be a number above 0 and at most {LARGEST}, not {value!r:.60}")
    return value


def check_layers(folder: Path) -> None:
    """Raises InvalidRequest for a family that is not supported, and for more layers than the folder has tensors.

    To be called before a folder is described: a description has a row for every layer.
    """
    config = read_config(folder)
    if config.get("model_type") not in READ:
        family_of(config)
    tensors = sum(1 for _ in Weights(folder))
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:
        raise InvalidRequest(
            f"{folder}/config.json: num_hidden_layers is {layers!r:.60}, and the folder has {tensors} tensors in all"
        )
