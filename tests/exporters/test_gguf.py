"""What stands in a written file, and how requests and folders that make no sense end."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.files import sha256_file
from cusprun.quants import TYPES
from cusprun.runtimes.gguf_header import load_metadata
from tests.exporters.models import edit_config, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "model")


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces or, with None, removes one tensor of the folder."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_header_says_what_is_inside(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    metadata = {
        "license": "apache-2.0",
        "base_model": "Pico",
        "languages": "en, de",
        "tags": "legal",
        "cusprun.note": "x",
    }
    report = export_gguf(folder, tmp_path / "out" / "pico.gguf", "f32", name="Pico legal", metadata=metadata)
    info = load_metadata(report.path)
    assert info.architecture == report.arch == "deci"
    assert (info.name, info.quant, info.context_length, info.head_dim, info.tied) == (
        "Pico legal",
        "f32",
        512,
        16,
        True,
    )
    assert [(layer.ffn, layer.heads, layer.kv_heads) for layer in info.layers] == [(96, 4, 2), (160, 2, 2), (64, 3, 1)]
    assert info.metadata["general.license"] == "apache-2.0"
    assert info.metadata["general.base_model.0.name"] == "Pico"
    assert info.metadata["general.languages"] == ["en", "de"]
    assert info.metadata["general.tags"] == ["legal"]
    assert info.metadata["cusprun.note"] == "x"
    assert info.metadata["general.size_label"] == "135K" or info.metadata["general.size_label"].endswith("K")
    weights = load_file(folder / "model.safetensors")
    assert info.parameters == report.parameters == sum(tensor.numel() for tensor in weights.values())
    matrices = sum(tensor.numel() for name, tensor in weights.items() if tensor.ndim == 2)
    assert info.macs_per_token == matrices  # tied: the embedding is multiplied as the output
    assert report.bytes == report.path.stat().st_size
    assert report.sha256 == sha256_file(report.path)


def test_same_folder_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = export_gguf(folder, tmp_path / "a" / "x.gguf", "q4_0", threads=1)
    second = export_gguf(folder, tmp_path / "b" / "x.gguf", "q4_0", threads=2)
    assert first.sha256 == second.sha256
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.gguf"]  # nothing temporary stays


def test_fallbacks_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", intermediate_size=48)
    report = export_gguf(folder, tmp_path / "x.gguf", "q4_k_m")
    by_tensor = {fallback.tensor: fallback for fallback in report.fallbacks}
    down = by_tensor["blk.0.ffn_down.weight"]
    assert (down.columns, down.got) == (48, "F16")  # 48 is no multiple of 32
    assert by_tensor["blk.0.attn_q.weight"].got == report.types["blk.0.attn_q.weight"] == "Q5_0"
    assert export_gguf(folder, tmp_path / "y.gguf", "f16").fallbacks == ()


def test_rows_that_divide_have_no_fallback(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    report = export_gguf(folder, tmp_path / "x.gguf", "q4_k_m")
    assert report.fallbacks == ()
    assert report.types["blk.0.ffn_gate.weight"] == "Q4_K"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_sources(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make(tmp_path / "model")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wide = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    other = tmp_path / "wide"
    shutil.copytree(folder, other)
    save_file(wide, other / "model.safetensors", metadata={"format": "pt"})
    # Through a 16-bit temporary or a float32 one: the quantized weights are the same.
    narrow = export_gguf(folder, tmp_path / "narrow.gguf", "q8_0", name="x")
    assert narrow.sha256 == export_gguf(other, tmp_path / "wide.gguf", "q8_0", name="x").sha256


def test_sharded_folder(tmp_path: Path, folder: Path) -> None:
    whole = export_gguf(folder, tmp_path / "whole.gguf", "f32", name="x")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert export_gguf(folder, tmp_path / "sharded.gguf", "f32", name="x").sha256 == whole.sha256


def test_sliding_window_ends_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model", family="mistral", sliding_window=128)
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    assert load_metadata(report.path).context_length == 128
    assert "sliding window of 128" in capsys.readouterr().err


def test_unknown_quant(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="q4_k_m"):
        export_gguf(folder, tmp_path / "x.gguf", "q3_x")


def test_unknown_metadata(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"licence.*license"):
        export_gguf(folder, tmp_path / "x.gguf", "f32", metadata={"licence": "MIT"})


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, tmp_path: Path, quant: str, value: float) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    tensor[3, 4] = value
    rewrite(folder, name, tensor)
    out = tmp_path / "out"
    with pytest.raises(Failed, match=name):
        export_gguf(folder, out / "x.gguf", quant)
    assert list(out.iterdir()) == []


def test_weights_beyond_f16(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    tensor[0, 0] = 1e6
    rewrite(folder, name, tensor)
    with pytest.raises(Failed, match=f"{name}.*f32"):
        export_gguf(folder, tmp_path / "x.gguf", "f16")
    assert export_gguf(folder, tmp_path / "x.gguf", "f32").quant == "f32"


def test_missing_tensor(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, "model.layers.1.self_attn.k_proj.weight", None)
    with pytest.raises(InvalidRequest, match=r"layers\.1\.self_attn\.k_proj\.weight is missing"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


def test_config_that_disagrees_with_weights(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, intermediate_size=96)
    with pytest.raises(InvalidRequest, match="gate_proj"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "llama3", "factor": 4.0}])
def test_rope_scaling_that_is_not_exported(folder: Path, tmp_path: Path, rope: dict[str, object]) -> None:
    edit_config(folder, rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(InvalidRequest, match=str(rope["rope_type"])):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


def test_truncated_safetensors(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


def test_safetensors_with_absurd_header(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(InvalidRequest, match=r"model\.safetensors"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


def test_failed_quantization_leaves_the_old_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.gguf"
    before = export_gguf(folder, out, "q8_0").sha256
    rewrite(folder, "model.norm.weight", torch.full((64,), float("nan")))
    with pytest.raises(Failed, match=r"model\.norm\.weight"):
        export_gguf(folder, out, "q8_0")
    assert sha256_file(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("quant", ["f16", "q4_0"])
def test_disk_that_takes_no_more(folder: Path, tmp_path: Path, quant: str) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = export_gguf(folder, tmp_path / "whole.gguf", "f16").bytes  # what the dry run needs
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 if quant == "f16" else size, limits[1]))
    try:
        with pytest.raises(Failed, match=r"x\.gguf could not be written"):
            export_gguf(folder, out / "x.gguf", quant)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(out.iterdir()) == []


def test_output_where_a_file_is_in_the_way(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(Failed, match="could not be written"):
        export_gguf(folder, tmp_path / "out" / "x.gguf", "f16")


def test_every_quant_is_what_it_says(folder: Path, tmp_path: Path) -> None:
    for quant in (name for name, kind in TYPES.items() if not kind.needs_imatrix and name != "auto"):
        report = export_gguf(folder, tmp_path / f"{quant}.gguf", quant)
        assert load_metadata(report.path).quant == quant


@pytest.mark.parametrize("quant", ["q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "iq3_m"])
def test_types_of_wide_blocks_on_narrow_rows_name_every_matrix(folder: Path, tmp_path: Path, quant: str) -> None:
    report = export_gguf(folder, tmp_path / "x.gguf", quant)
    matrices = {name for name, kind in report.types.items() if kind != "F32"}
    assert matrices
    assert {fallback.tensor for fallback in report.fallbacks} == matrices
    assert all(fallback.got == report.types[fallback.tensor] != fallback.wanted for fallback in report.fallbacks)


def test_single_tensors_get_the_type_they_are_given(folder: Path, tmp_path: Path) -> None:
    report = export_gguf(
        folder, tmp_path / "x.gguf", "q4_0", overrides=[(r"blk\.0\.ffn_down", "q8_0"), ("attn_v", "q6_k")]
    )
    plain = export_gguf(folder, tmp_path / "plain.gguf", "q4_0").types
    assert report.types["blk.0.ffn_down.weight"] == "Q8_0"
    assert plain["blk.0.ffn_down.weight"] == report.types["blk.1.ffn_down.weight"] == "Q4_0"
    named = {fallback.tensor: fallback.wanted for fallback in report.fallbacks}
    assert named["blk.0.attn_v.weight"] == "Q6_K"  # rows of 64 are no block of 256
    changed = {name for name, kind in report.types.items() if plain[name] != kind}
    assert all("attn_v" in name or name == "blk.0.ffn_down.weight" for name in changed)


@pytest.mark.parametrize(
    ("quant", "overrides", "message"),
    [("f16", [("attn_v", "q8_0")], "written without it"), ("q4_0", [("nothing", "q8_0")], "no matrix has such a name")],
)
def test_overrides_that_nothing_comes_of(
    folder: Path, tmp_path: Path, quant: str, overrides: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        export_gguf(folder, tmp_path / "x.gguf", quant, overrides=overrides)
