"""Importance matrix: the numbers, the file, and that llama.cpp's quantizer goes by it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cusprun.checkpoint import load_model
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.imatrix import collect_imatrix
from cusprun.exporters.imatrix_file import COUNTS, SUMS, read_imatrix, write_imatrix
from cusprun.exporters.proof import prove_gguf
from tests.exporters.models import make, windows


@pytest.fixture(params=["uniform", "per-layer"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return make(tmp_path / "model", layout=request.param, tie_word_embeddings=False)


def inputs_of_linears(folder: Path, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Mean squared inputs by column of every linear map of the whole model in torch."""
    model, seen = load_model(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0].flatten(0, -2).square().mean(0))
            )
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return seen


def test_means_are_those_of_the_whole_model(folder: Path) -> None:
    ids = windows(folder)
    found = collect_imatrix(folder, {"a": ids[:1], "b": ids[1:]})
    expected = inputs_of_linears(folder, ids)
    assert found.tokens == ids.size
    assert len(found.sums) == len(expected)
    means = found.means()
    torch.testing.assert_close(torch.from_numpy(means["output.weight"]), expected["lm_head"], rtol=0.03, atol=1e-4)
    for name, ours in (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output"), ("mlp.up_proj", "ffn_up")):
        torch.testing.assert_close(
            torch.from_numpy(means[f"blk.1.{ours}.weight"]), expected[f"model.layers.1.{name}"], rtol=0.03, atol=1e-4
        )


def test_the_file_is_the_one_that_llama_cpp_writes(folder: Path, tmp_path: Path) -> None:
    found = collect_imatrix(folder, {"text": windows(folder)})
    write_imatrix(tmp_path / "x.imatrix", found, ["text"])
    reader = gguf.GGUFReader(tmp_path / "x.imatrix")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text"]
    assert (
        reader.fields["imatrix.chunk_count"].contents() * reader.fields["imatrix.chunk_size"].contents() == found.tokens
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight" + SUMS].shape.tolist() == [64, 1]  # as ggml counts: columns, matrices
    assert tensors["blk.0.attn_q.weight" + COUNTS].data.item() == found.tokens
    for name, values in read_imatrix(tmp_path / "x.imatrix").items():
        np.testing.assert_allclose(values, found.means()[name], rtol=1e-6)


def test_the_quantizer_goes_by_it(folder: Path, tmp_path: Path) -> None:
    """Weighed by inputs that differ by column the rounded matrix is another, and errs less where inputs are large."""
    chance = np.random.default_rng(0)
    found = collect_imatrix(folder, {"text": windows(folder)})
    lopsided = {
        name: values * np.where(chance.random(values.size) < 0.2, 1e4, 1.0) for name, values in found.sums.items()
    }
    matrix = tmp_path / "x.imatrix"
    write_imatrix(matrix, type(found)(lopsided, found.tokens, found.window), ["text"])
    files = [export_gguf(folder, tmp_path / "nearest.gguf", "q4_0").path]
    files.append(export_gguf(folder, tmp_path / "weighed.gguf", "q4_0", imatrix=matrix).path)
    whole = tensor_of(export_gguf(folder, tmp_path / "whole.gguf", "f32").path)
    weights = lopsided["blk.1.ffn_up.weight"]
    plain, weighed = (float((np.square(tensor_of(path) - whole) * weights).sum()) for path in files)
    assert weighed < 0.9 * plain


def tensor_of(path: Path, name: str = "blk.1.ffn_up.weight") -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_two_bits_need_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="iq2_m needs an importance matrix"):
        export_gguf(folder, tmp_path / "x.gguf", "iq2_m")
    matrix = tmp_path / "x.imatrix"
    write_imatrix(matrix, collect_imatrix(folder, {"text": windows(folder)}), ["text"])
    report = export_gguf(folder, tmp_path / "x.gguf", "iq2_m", imatrix=matrix)
    assert np.isfinite(prove_gguf(report.path, folder, windows(folder), threads=1).kld_mean)


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no gguf at all")
    with pytest.raises(InvalidRequest, match="no importance matrix"):
        export_gguf(folder, tmp_path / "x.gguf", "q4_0", imatrix=tmp_path / "text")
    model = export_gguf(folder, tmp_path / "model.gguf", "f16").path
    with pytest.raises(InvalidRequest, match="holds no importance matrix"):
        export_gguf(folder, tmp_path / "x.gguf", "q4_0", imatrix=model)
    with pytest.raises(InvalidRequest, match="there is no calibration text"):
        collect_imatrix(folder, {"text": windows(folder)[:0]})
    assert not (tmp_path / "x.gguf").exists()
