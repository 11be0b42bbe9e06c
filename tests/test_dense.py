"""What a dense model is read from: a .gguf of which a part would be lost is refused; other files beside the weights do
not count.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from cusprun.checkpoint import Weights, weight_files, write_weights
from cusprun.dense import DOWNLOADED, NOT_FETCHED, check_gguf, find_dense, read_sizes
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes.gguf_header import load_metadata
from tests import pico

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"rope_parameters": LLAMA_3}, "scaled positions"),
     ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "scaled positions"),
     ({"attention_bias": True}, r"not read from a GGUF \(blk\.0\.attn_k\.bias")],
)  # fmt: skip
def test_a_gguf_that_would_lose_something_is_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    folder = pico.save_model(tmp_path / "m", **settings)
    path = export_gguf(folder, tmp_path / "m.gguf", "f32").path
    assert read_sizes(str(path), convertible=False).anatomy.hidden_size == 64  # `inspect` tells what it is
    for read in (read_sizes, find_dense):
        with pytest.raises(InvalidRequest, match=f"m.gguf has .*{reason}.*name the Hugging Face folder"):
            read(str(path))


def test_a_split_gguf_experts_and_missing_tensors_are_refused(tmp_path: Path, pico_model: Path) -> None:
    path = export_gguf(pico_model, tmp_path / "m.gguf", "f32").path
    info = load_metadata(path)
    check_gguf(info)
    with pytest.raises(InvalidRequest, match="mixture of experts"):
        check_gguf(replace(info, metadata={**info.metadata, "llama.expert_count": 8}))
    with pytest.raises(InvalidRequest, match=r"lacks tensors of a Llama \(blk\.1\.ffn_gate\.weight\)"):
        check_gguf(replace(info, tensors=tuple(t for t in info.tensors if t.name != "blk.1.ffn_gate.weight")))
    words = ["export", str(pico_model), "--quant", "f32", "--split-max-size", "60KB", "--out", str(tmp_path / "split")]
    done = subprocess.run([sys.executable, "-m", "cusprun.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = min((tmp_path / "split").glob("*-00001-of-*.gguf"))
    with pytest.raises(InvalidRequest, match="is split: join it"):
        read_sizes(str(first))


def test_a_gguf_gives_the_weights_it_was_made_of(tmp_path: Path, pico_model: Path) -> None:
    dense = find_dense(str(export_gguf(pico_model, tmp_path / "m.gguf", "f32").path))
    read, wanted = Weights(dense.folder), Weights(pico_model)
    assert sorted(read) == sorted(wanted)
    assert all((read[name] == wanted[name]).all() for name in wanted)


def test_the_same_weights_are_fetched_once() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    other = [
        "consolidated.safetensors",
        "consolidated.00.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
    ]
    files = [*wanted, *other, "onnx/config.json"]
    assert (
        list(filter_repo_objects(files, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_FETCHED))) == wanted
    )


def test_files_beside_the_weights_are_no_part_of_the_model(tmp_path: Path, pico_model: Path) -> None:
    tensors = load_file(pico_model / "model.safetensors")
    folder = tmp_path / "sharded"
    shutil.copytree(pico_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    from safetensors.torch import load_file as load_torch

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_weights(folder, load_torch(pico_model / "model.safetensors").items(), sizes, shard_bytes=100_000)
    alone = find_dense(str(folder))
    assert len(weight_files(folder)) > 2
    assert alone.bytes == sum(path.stat().st_size for path in weight_files(folder))
    save_file(tensors, folder / "consolidated.safetensors")
    assert find_dense(str(folder)) == alone
