"""Parameters and multiplications by shape, for folders and files, tied and untied."""

from pathlib import Path

import pytest

from cusprun.anatomy import describe
from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.speed import bench, ratios
from cusprun.compact import compact
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from cusprun.plan import LayerPlan, make_plan
from cusprun.vocabulary import close, read_pieces, trim_model
from tests import pico


def by_hand(vocab: int, tied: bool) -> tuple[int, int]:
    """Parameters and MACs of pico's shape: hidden 64, 3 layers, FFN 128, 4 heads on 2 kv heads of 16."""
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    head = vocab * 64
    return 3 * (layer + 2 * 64) + 64 + head * (1 if tied else 2), 3 * layer + head


@pytest.mark.parametrize("tied", [True, False])
def test_folder_and_gguf(tmp_path: Path, tied: bool) -> None:
    folder = pico.save_model(tmp_path / "model", tie_word_embeddings=tied)
    files = {quant: tmp_path / f"model-{quant}.gguf" for quant in ("f32", "q8_0")}
    for quant, path in files.items():
        export_gguf(folder, path, quant)
    costs = {"folder": cost(folder), **{quant: cost(path) for quant, path in files.items()}}
    vocab = costs["folder"].macs_per_token // 64 - 3 * (64 * 2 + 32 * 2 + 3 * 128)
    for found in costs.values():
        assert (found.parameters, found.macs_per_token) == by_hand(vocab, tied)
    assert costs["folder"].quant == costs["f32"].quant == "f32"
    assert costs["q8_0"].quant == "q8_0"
    assert costs["q8_0"].file_bytes == files["q8_0"].stat().st_size < costs["f32"].file_bytes
    assert costs["folder"].file_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_an_onnx_folder_is_as_large_as_all_its_files(tmp_path: Path) -> None:
    """The tokenizer too: a GGUF holds it as well."""
    report = export_onnx(pico.save_model(tmp_path / "model"), tmp_path / "onnx", "int8")
    assert cost(report.path).file_bytes == report.bytes
    assert report.bytes > sum(path.stat().st_size for path in report.path.glob("*.onnx*"))


def test_layers_gone_layers_without_attention_and_a_trimmed_vocabulary(tmp_path: Path) -> None:
    """Folder, file and anatomy count the same, and both run in the speed bench."""
    dense = pico.save_model(tmp_path / "dense", num_hidden_layers=4)
    pieces = read_pieces(dense)
    trim_model(dense, sorted(close(pieces, pieces.removable[::2].tolist())), tmp_path / "trimmed")
    whole, some = LayerPlan(tuple(range(128)), (0, 1)), tuple(range(0, 128, 2))
    plan = make_plan(describe(tmp_path / "trimmed"), (whole, LayerPlan((), ()), LayerPlan(some, ()), whole))
    expert, file = tmp_path / "expert", tmp_path / "expert.gguf"
    compact(tmp_path / "trimmed", plan, expert)
    export_gguf(expert, file, "f32")
    for found in (cost(expert), cost(file)):
        assert found.parameters == plan.expert.parameters < describe(dense).parameters
        assert found.macs_per_token == plan.expert.macs_per_token
    export_gguf(dense, tmp_path / "dense.gguf", "f32")
    rows = bench([file, tmp_path / "dense.gguf"], prefill=8, decode=4, repetitions=1, threads=1)
    found = ratios(*rows)
    assert found["macs_per_token"]["exact"] == plan.expert.macs_per_token / describe(dense).macs_per_token
    assert found["decode_yield"]["median_of_pairs"] > 0


def test_parameters_are_torch_s(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert cost(folder).parameters == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_what_is_no_artifact(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no config\.json"):
        cost(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"holds no \.safetensors file"):
        cost(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(Failed, match="not a whole safetensors file"):
        cost(tmp_path)
    with pytest.raises(InvalidRequest, match="no model folder"):
        cost(tmp_path / "model.bin")
    (tmp_path / "text.gguf").write_text("this is a text and no model at all")
    with pytest.raises(InvalidRequest, match="not a GGUF file"):
        cost(tmp_path / "text.gguf")
