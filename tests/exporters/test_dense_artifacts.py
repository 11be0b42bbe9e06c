"""The dense model's files, which experts are held against."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cusprun.dense import find_dense
from cusprun.exporters.dense_artifacts import DenseArtifacts
from tests import pico


def test_the_size_is_told_before_there_is_text_to_round_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an importance matrix q4_0 files have q4_1 in down_proj of the first eighth of the layers."""
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    dense = find_dense(str(pico.save_model(tmp_path / "pico", num_hidden_layers=8)))
    windows = tmp_path / "windows.safetensors"
    artifacts = DenseArtifacts(dense, windows, tmp_path)
    told = artifacts.gguf_bytes("q4_0")
    assert told > DenseArtifacts(dense, windows, tmp_path, wish="nearest").gguf_bytes("q4_0")
    ids = np.random.default_rng(0).integers(3, 400, size=(16, 64))
    save_file({"text": ids}, windows)
    path = artifacts.artifact("q4_0")
    assert path.stat().st_size == told
    assert version("llama-cpp-python") in path.parent.name  # another quantizer writes another file
    assert version("onnxruntime") in artifacts.artifact("int8").name
