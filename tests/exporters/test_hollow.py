"""Hollow models: their exports are as large and of the same types as those of the experts that they stand for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.compact import compact
from cusprun.exporters.gguf import GgufExport
from cusprun.exporters.hollow import write_hollow
from cusprun.exporters.onnx import OnnxExport
from cusprun.plan import LayerPlan, make_plan
from cusprun.runtimes.gguf_header import load_metadata
from cusprun.vocabulary import close, read_pieces, trim_model

PLANS = {
    "per-layer": [LayerPlan(tuple(range(96)), (0, 1)), LayerPlan(tuple(range(64)), (1,)), LayerPlan((), ())],
    "uniform": [LayerPlan(tuple(range(64)), (0,))] * 3,
}


@pytest.mark.parametrize("layout", PLANS)
@pytest.mark.parametrize("trimmed", [False, True])
def test_a_file_has_the_bytes_that_were_told_before_there_were_weights(
    tmp_path: Path, pico_model: Path, layout: str, trimmed: bool
) -> None:
    base, kept = pico_model, None
    if trimmed:
        pieces, base = read_pieces(pico_model), tmp_path / "trimmed"
        kept = sorted(close(pieces, range(300)))
        trim_model(pico_model, kept, base)
    plan = make_plan(describe(base), tuple(PLANS[layout]))
    compact(base, plan, tmp_path / "expert")
    write_hollow(pico_model, plan.expert, tmp_path / "hollow", kept)
    for quant in ("q8_0", "q4_0", "f16"):
        told = GgufExport(tmp_path / "hollow", quant, name="expert").prediction
        report = GgufExport(tmp_path / "expert", quant, name="expert").write(tmp_path / f"{quant}.gguf")
        assert told.bytes == report.bytes
        assert dict(told.types) == report.types
    hollow = OnnxExport(tmp_path / "hollow", "int8", name="expert").write(tmp_path / "hollow-int8")
    report_onnx = OnnxExport(tmp_path / "expert", "int8", name="expert").write(tmp_path / "int8")
    assert hollow.bytes == pytest.approx(report_onnx.bytes, rel=0.002)


def test_a_pre_tokenizer_that_the_user_named_is_known_to_hollow_models(tmp_path: Path, pico_model: Path) -> None:
    folder = tmp_path / "named"
    shutil.copytree(pico_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "cusprun": {"tokenizer_pre": "gpt-2", "licence": "mit"}}))
    write_hollow(folder, describe(folder), tmp_path / "hollow")
    assert json.loads((tmp_path / "hollow" / "config.json").read_text())["cusprun"] == {"tokenizer_pre": "gpt-2"}
    GgufExport(tmp_path / "hollow", "q8_0").write(tmp_path / "hollow.gguf")
    assert load_metadata(tmp_path / "hollow.gguf").metadata["tokenizer.ggml.pre"] == "gpt-2"


def test_a_hollow_file_runs_with_the_multiplications_of_the_expert(tmp_path: Path, pico_model: Path) -> None:
    from cusprun.runtimes import open_runtime

    plan = make_plan(describe(pico_model), tuple(PLANS["per-layer"]))
    write_hollow(pico_model, plan.expert, tmp_path / "hollow")
    GgufExport(tmp_path / "hollow", "q8_0").write(tmp_path / "hollow.gguf")
    assert load_metadata(tmp_path / "hollow.gguf").macs_per_token == plan.expert.macs_per_token
    runtime = open_runtime(tmp_path / "hollow.gguf", context=64)
    assert not runtime.prefill(list(range(20))).any()
    runtime.close()


def test_the_weights_take_no_disk(tmp_path: Path, pico_model: Path) -> None:
    anatomy = describe(pico_model)
    layers = tuple(dataclasses.replace(layer, ffn=2**18) for layer in anatomy.layers)
    write_hollow(pico_model, dataclasses.replace(anatomy, layers=layers), tmp_path / "hollow")
    weights = (tmp_path / "hollow" / "model.safetensors").stat()
    assert weights.st_size > 100 * 2**20
    assert weights.st_blocks * 512 < 2**20


def test_rows_and_tokens_have_to_be_as_many(tmp_path: Path, pico_model: Path) -> None:
    with pytest.raises(ValueError, match="another number of tokens"):
        write_hollow(pico_model, describe(pico_model).with_vocabulary(300), tmp_path / "hollow")
    assert not (tmp_path / "hollow").exists()


def test_what_is_timed_is_filled_with_numbers_that_do_not_repeat_by_the_page(tmp_path: Path, pico_model: Path) -> None:
    anatomy = describe(pico_model)
    layers = tuple(dataclasses.replace(layer, ffn=2**13) for layer in anatomy.layers)
    for name in ("one", "two"):
        write_hollow(pico_model, dataclasses.replace(anatomy, layers=layers), tmp_path / name, noise=True)
    raw = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert raw == (tmp_path / "two" / "model.safetensors").read_bytes()
    pages = [raw[at : at + 4096] for at in range(0, len(raw) - 4096, 4096)]
    assert len(pages) > 4000
    assert len(set(pages)) == len(pages)
    found = load_model(tmp_path / "one")
    assert all(0 < float(tensor.abs().max()) < 0.2 for tensor in found.state_dict().values())
