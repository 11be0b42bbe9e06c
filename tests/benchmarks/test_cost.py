"""Parameters and multiplications by shape, for folders and files, tied and untied."""

from pathlib import Path

import pytest

from cusprun.benchmarks.cost import cost
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import export_gguf
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
    with pytest.raises(InvalidRequest, match="neither a model folder"):
        cost(tmp_path / "model.bin")
    (tmp_path / "text.gguf").write_text("this is a text and no model at all")
    with pytest.raises(InvalidRequest, match="not a GGUF file"):
        cost(tmp_path / "text.gguf")
