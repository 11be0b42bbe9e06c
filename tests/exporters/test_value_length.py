"""Why value dimensions are not cut: llama.cpp wants a head's values as long as its keys, for every layout we export.

A failure here is good news: the llama.cpp at hand computes such files, and docs/decisions/005 is out of date.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from cusprun.anatomy import Anatomy, describe, read_config
from cusprun.checkpoint import Weights
from cusprun.errors import Failed
from cusprun.exporters import gguf_metadata, gguf_tensors, gguf_tokenizer
from cusprun.runtimes.child import run_in_child
from tests.exporters.models import make, windows


def write_with_value_length(folder: Path, path: Path, value: int, *, wide_output: bool) -> Path:
    """A model folder as f32 .gguf whose heads have ``value`` value dimensions, the first ones of each.

    With ``wide_output`` the columns of attn_output that no value meets stay, as zeros.
    """
    anatomy, config, weights = describe(folder), read_config(folder), Weights(folder)
    arch, rope = gguf_metadata.architecture(anatomy), gguf_tensors.read_rope(config, anatomy.head_dim)
    writer = gguf.GGUFWriter(path, arch)
    gguf_metadata.write_sizes(writer, anatomy, config, rope)
    writer.kv_data[0][f"{arch}.attention.value_length"].value = value
    gguf_tokenizer.write_vocabulary(writer, gguf_tokenizer.read_vocabulary(folder, anatomy.vocab_size, config))
    plans = gguf_tensors.plan_tensors(anatomy, "F32", rope.freqs)
    for plan, tensor in zip(plans, gguf_tensors.read_tensors(weights, plans, rope.freqs), strict=True):
        writer.add_tensor(plan.name, _cut(plan.name, tensor, anatomy, value, wide_output))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _cut(name: str, tensor: np.ndarray, anatomy: Anatomy, value: int, wide_output: bool) -> np.ndarray:
    dim, hidden = anatomy.head_dim, anatomy.hidden_size
    if name.endswith("attn_v.weight"):  # (kv_heads * dim, hidden)
        return np.ascontiguousarray(tensor.reshape(-1, dim, hidden)[:, :value].reshape(-1, hidden))
    if name.endswith("attn_output.weight"):  # (hidden, heads * dim)
        runs = tensor.reshape(hidden, -1, dim).copy()
        runs[:, :, value:] = 0.0
        return np.ascontiguousarray((runs if wide_output else runs[:, :, :value]).reshape(hidden, -1))
    return tensor


def run_exactly(path: str, tokens: list[int]) -> list[list[float]]:
    """Logits of the file in float32; runs in the child process."""
    from cusprun.runtimes.llamacpp import LlamaCppRuntime

    rows: list[list[float]] = LlamaCppRuntime(Path(path), context=64, threads=1, exact=True).logits(tokens).tolist()
    return rows


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_llamacpp_wants_values_as_long_as_keys(tmp_path: Path, layout: str) -> None:
    folder = make(tmp_path / "model", layout=layout)
    tokens = windows(folder)[0].tolist()
    same = write_with_value_length(folder, tmp_path / "same.gguf", 16, wide_output=False)
    assert np.isfinite(run_in_child(run_exactly, str(same), tokens)).all()
    cut = write_with_value_length(folder, tmp_path / "cut.gguf", 8, wide_output=False)
    with pytest.raises(Failed, match=r"blk\.0\.attn_output\.weight' has wrong shape"):
        run_in_child(run_exactly, str(cut), tokens)
    wide = write_with_value_length(folder, tmp_path / "wide.gguf", 8, wide_output=True)
    with pytest.raises(Failed, match=r"SIGABRT[\s\S]*n_embd_head_k"):
        run_in_child(run_exactly, str(wide), tokens)
