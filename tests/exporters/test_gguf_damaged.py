"""Damaged model folders: each ends in one message that names the tensor or the key, at once, and leaves nothing."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf_request import export_folder
from tests.exporters.models import edit_config, make

DOWN = "model.layers.0.mlp.down_proj.weight"
HUGE = 10**12


def tensor(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(DOWN))
        save_file({**tensors, **({DOWN: changed} if changed is not None else {})}, folder / "model.safetensors")

    return damage


def with_value(value: float) -> Callable[[Path], None]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[1, 2] = value
        return weight

    return tensor(change)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Another header on the same data."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (tensor(lambda _: None), f"tensor {DOWN} is missing"),
    "whole numbers": (tensor(lambda weight: weight.long()), f"tensor {DOWN} has element type I64"),
    "booleans": (tensor(lambda weight: weight > 0), f"tensor {DOWN} has element type BOOL"),
    "another shape": (tensor(lambda weight: weight[:, :-1].clone()), rf"tensor {DOWN} is \[64, 127\]; config.json"),
    "transposed": (tensor(lambda weight: weight.t().contiguous()), rf"tensor {DOWN} is \[128, 64\]; config.json"),
    "nan": (with_value(float("nan")), f"tensor {DOWN} holds NaN"),
    "infinity": (with_value(float("inf")), f"tensor {DOWN} holds NaN or infinity"),
    "shape beyond the data": (header(lambda found: found[DOWN].update(shape=[HUGE, HUGE])), "model.safetensors is not"),
    "offsets beyond the data": (
        header(lambda found: found[DOWN].update(data_offsets=[0, HUGE])), "model.safetensors is not",
    ),
    "header beyond the file": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", HUGE) + b"{}") and None,
        "model.safetensors is not",
    ),
    "end token of text": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [2, "x"]}') and None,
        "eos_token_id holds 'x'",
    ),
    "end token beyond the vocabulary": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [2, 512]}') and None,
        "eos_token_id holds 512",
    ),
    "too many layers": (config(num_hidden_layers=HUGE), "num_hidden_layers"),
    "more layers than weights": (config(num_hidden_layers=4), r"layers\.3\..*is missing"),
    "huge width": (config(intermediate_size=HUGE), "gate_proj"),
    "huge hidden size": (config(hidden_size=HUGE), "embed_tokens"),
    "huge heads": (config(head_dim=HUGE), "q_proj"),
    "huge vocabulary": (config(vocab_size=HUGE), "embed_tokens"),
    "negative size": (config(hidden_size=-1), "hidden_size must be"),
    "size of text": (config(hidden_size="64"), "hidden_size must be"),
    "epsilon of text": (config(rms_norm_eps="small"), "rms_norm_eps"),
    "context of text": (config(max_position_embeddings="long"), "max_position_embeddings"),
    "huge context": (config(max_position_embeddings=HUGE), "max_position_embeddings"),
    "window of text": (config(sliding_window=[1]), "sliding_window"),
    "rotation of text": (config(rope_parameters={"rope_theta": "far"}), "rope_theta"),
    "rotation of no number": (config(rope_parameters={"rope_theta": float("nan")}), "rope_theta"),
    "rotation that is a list": (config(rope_parameters=[1]), "rope_parameters"),
    "factor of text": (config(rope_parameters={"rope_type": "linear", "factor": "far"}), "factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_end_in_one_message_and_leave_nothing(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "pico")
    damage, message = DAMAGES[name]
    damage(folder)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises((InvalidRequest, Failed), match=message) as caught:
        export_folder(folder, tmp_path / "out" / "x.gguf", "f32")
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
