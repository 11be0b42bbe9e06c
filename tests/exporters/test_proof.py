"""What the proof accepts, what it refuses, and that a crash of llama.cpp is a message."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.benchmarks.peers.limits import rounded_types
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.proof import BROKEN_KLD, compare_logits, prove_gguf, rounding_limit
from cusprun.formats import bits_of
from cusprun.onnx_types import TYPES as ONNX
from cusprun.quants import TYPES as GGUF
from tests.exporters.models import make, windows


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder, other = make(tmp_path / "model"), make(tmp_path / "other", seed=1)
    for path in (folder / "model.safetensors", other / "model.safetensors"):
        tensors = load_file(path)
        tensors["model.norm.weight"] *= 10  # a random model is nearly as sure as a trained one
        save_file(tensors, path, metadata={"format": "pt"})
    report = export_gguf(other, tmp_path / "x.gguf", "q8_0")
    with pytest.raises(Failed, match="not the model it was made from"):
        prove_gguf(report.path, folder, windows(folder), strict=False, threads=1)


def test_slightly_wrong_weights_are_refused_only_when_strict(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match="does not reproduce torch"):
        prove_gguf(report.path, folder, windows(folder), threads=1)
    assert prove_gguf(report.path, folder, windows(folder), strict=False, threads=1).kld_mean > 1e-4


def test_more_than_rounding_explains_is_refused(tmp_path: Path) -> None:
    """A rounded file is held against what its type costs the embedded model."""
    folder = make(tmp_path / "model")
    report = export_gguf(folder, tmp_path / "x.gguf", "q8_0")
    assert prove_gguf(report.path, folder, windows(folder), threads=1).kld_mean < 2e-3
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match=r"further from torch than q8_0 explains.*3 times what the type costs smollm2"):
        prove_gguf(report.path, folder, windows(folder), threads=1)
    limit = rounding_limit("q8_0")
    assert limit is not None
    assert limit < prove_gguf(report.path, folder, windows(folder), strict=False, threads=1).kld_mean < BROKEN_KLD


def test_fewer_bits_are_never_allowed_less() -> None:
    known = {quant: limit for quant in (*GGUF, *ONNX) if (limit := rounding_limit(quant)) is not None}
    assert set(known) == set(rounded_types())
    for quant, limit in known.items():
        assert 0 < limit <= BROKEN_KLD
        assert all(limit >= other for name, other in known.items() if bits_of(name) >= bits_of(quant))
    assert rounding_limit("iq2_m") is None  # it needs text, and no figure is known
    assert rounding_limit("f16") is None  # has a bar of its own


def without_last_ffn(source: Path, out: Path) -> None:
    """A copy of a three-layer deci file whose last layer has no FFN, by which llama.cpp aborts."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "deci")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = field.contents()
            if name == "deci.feed_forward_length":
                value = [*value[:-1], 0]
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.2.ffn_"):
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_crash_is_a_message(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    without_last_ffn(report.path, tmp_path / "broken.gguf")
    with pytest.raises(Failed, match="crashed with SIG"):
        prove_gguf(tmp_path / "broken.gguf", folder, windows(folder), threads=1)


def test_refusal_is_a_message(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    reader = gguf.GGUFReader(report.path, "r+")
    field = reader.fields["deci.rope.dimension_count"]
    field.parts[field.data[-1]][0] = 8
    reader.data.flush()
    with pytest.raises(Failed, match=r"does not load .*n_rot"):
        prove_gguf(report.path, folder, windows(folder), threads=1)


def test_windows_that_make_no_sense(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    with pytest.raises(InvalidRequest, match="window"):
        prove_gguf(report.path, folder, np.zeros((0, 8), dtype=np.int64))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        prove_gguf(report.path, folder, np.full((1, 8), 10**6))
    with pytest.raises(InvalidRequest, match="context"):
        prove_gguf(report.path, folder, np.zeros((1, 600), dtype=np.int64))


def test_figures_against_torch() -> None:
    torch.manual_seed(0)
    wanted, got = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    targets = torch.tensor([3, 1, 4, 1])
    kld, same, nll = compare_logits(wanted.numpy(), got.numpy(), targets.numpy())
    expected = torch.nn.functional.kl_div(
        got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
    )
    np.testing.assert_allclose(kld, expected.sum(-1).numpy(), rtol=1e-9)
    assert same.tolist() == (wanted.argmax(-1) == got.argmax(-1)).tolist()
    losses = [torch.nn.functional.cross_entropy(logits[:4], targets, reduction="sum") for logits in (wanted, got)]
    np.testing.assert_allclose(nll, [float(loss) for loss in losses], rtol=1e-9)


def test_tied_first_choices_agree() -> None:
    wanted = np.array([[1.0, 5.0, 5.0, 0.0], [1.0, 5.0, 4.9, 0.0]], dtype=np.float32)
    got = np.array([[1.0, 4.9, 5.0, 0.0], [1.0, 4.9, 5.0, 0.0]], dtype=np.float32)
    assert compare_logits(wanted, got, np.array([0]))[1].tolist() == [True, False]
