"""Damaged .gguf files end in a message of ours before llama.cpp sees them."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes import open_runtime
from cusprun.runtimes.gguf_header import load_metadata
from tests.pico import save_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = save_model(tmp_path_factory.mktemp("header") / "model", num_hidden_layers=1)
    return export_gguf(folder, folder.parent / "x.gguf", "f16").path.read_bytes()


def with_bytes(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
        (b"PK\x03\x04" + bytes(100), "starts with"),
        (b"just some text, long enough to be read as one", "starts with"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "version 50331648"),
    ],
)
def test_not_a_gguf(tmp_path: Path, data: bytes, message: str) -> None:
    path = with_bytes(tmp_path, data)
    with pytest.raises(InvalidRequest, match=message):
        load_metadata(path)
    with pytest.raises(InvalidRequest, match=message):
        open_runtime(path)


@pytest.mark.parametrize(
    ("tensors", "pairs", "message"),
    [(2**60, 0, "tensors"), (0, 2**60, "metadata entries"), (0, 0, "general.architecture"), (0, 1, "metadata")],
)
def test_absurd_counts(tmp_path: Path, tensors: int, pairs: int, message: str) -> None:
    path = with_bytes(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"\xff" * 64)
    with pytest.raises(Failed, match=message):
        load_metadata(path)


def test_truncated_anywhere(tmp_path: Path, good: bytes) -> None:
    for share in (0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999):
        path = with_bytes(tmp_path, good[: max(24, int(len(good) * share))])
        with pytest.raises(Failed, match=r"truncated|damaged"):
            open_runtime(path)


def test_a_header_with_noise_never_escapes(tmp_path: Path, good: bytes) -> None:
    """Bytes turned over in the header give the file or one of our errors, nothing else."""
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(3):
            data[rng.randrange(4, 2000)] = rng.randrange(256)
        path = with_bytes(tmp_path, bytes(data))
        with suppress(Failed, InvalidRequest):
            load_metadata(path)


def test_key_of_another_kind(tmp_path: Path, good: bytes) -> None:
    changed = good.replace(b"llama.block_count", b"llama.block_crunt")
    with pytest.raises(Failed, match="block_count"):
        load_metadata(with_bytes(tmp_path, changed))


def test_llama_cpp_refuses_with_its_reason(tmp_path: Path, good: bytes) -> None:
    """A tensor under another name: the header is sound, the model is not."""
    path = with_bytes(tmp_path, good.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xp.weight"))
    assert load_metadata(path).architecture == "llama"
    with pytest.raises(Failed, match="ffn_up"):
        open_runtime(path)
