"""`cusprun-edge export` of both formats: one request, every artifact proved, all checked before any is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cusprun.benchmarks.cost import cost
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import request
from cusprun.exporters.request import Exported, Settings, export_model
from cusprun.runtimes import open_runtime
from tests.exporters.models import make, windows
from tests.pico import SENTENCES
from tests.test_build import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "pico", layout="per-layer")


def test_both_formats_from_one_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--format", "gguf,onnx", "--quant", "q4_0,int4", "--out", out, "--output-bits", 4]
    planned = json.loads(run("export", folder, *words, "--dry-run", "--json").stdout)["artifacts"]
    assert not out.exists()
    done = json.loads(run("export", folder, *words, "--json").stdout)["artifacts"]
    assert sorted(path.name for path in out.iterdir()) == ["int4", "pico-q4_0.gguf"]
    assert [entry["format"] for entry in done] == ["gguf", "onnx"]
    for entry in done:
        assert entry["proof"]["tokenizer_equal"]
        assert entry["proof"]["tokens"] > 100
        assert open_runtime(Path(entry["path"])).logits(windows(folder)[0].tolist()).shape[0] == 64
    assert planned[0]["bytes"] == done[0]["bytes"]
    written = cost(out / "int4").file_bytes
    graph = (out / "int4" / "model.onnx").stat().st_size
    assert planned[1]["bytes"] == pytest.approx(written, abs=graph)
    assert planned[1]["settings"]["output_bits"] == 4


def test_one_type_goes_to_out_itself(folder: Path, tmp_path: Path) -> None:
    export_model(folder, tmp_path / "onnx", ["onnx"], ["fp32"], Settings(prove=False))
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    export_model(folder, tmp_path / "x.gguf", [], ["f16"], Settings(prove=False))
    assert (tmp_path / "x.gguf").is_file()


@pytest.mark.parametrize(
    ("formats", "types", "settings", "message"),
    [
        (["onnx"], ["q8_0"], {}, "write --format gguf"),
        ([], ["int4"], {"tensor_types": ["attn_v=q8_0"]}, "--tensor-type changes nothing in int4"),
        ([], ["int8"], {"block_size": 128}, "--block-size changes nothing in int8"),
        ([], ["q4_0"], {"zero_points": True}, "--zero-points changes nothing in q4_0"),
        ([], ["fp32"], {"corpus": Path("x.txt")}, "--corpus changes nothing in fp32"),
        ([], ["q4_0"], {"context": 64}, "--context changes nothing"),
        ([], ["q8_0,fp32"], {"context": 4096}, "trained for 512"),
        ([], ["q4_0"], {"corpus": Path("x.txt"), "imatrix": Path("y")}, "give one"),
    ],
)
def test_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, formats: list[str], types: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        export_model(folder, tmp_path / "out", formats, types, Settings(**settings))
    assert not (tmp_path / "out").exists()


def test_several_types_need_a_folder_and_overwrite_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="name a folder"):
        export_model(folder, tmp_path / "x.gguf", [], ["q4_0", "int4"], Settings())
    (tmp_path / "out" / "int4").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="int4 exists"):
        export_model(folder, tmp_path / "out", [], ["q4_0", "int4"], Settings())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["int4"]


def test_one_importance_matrix_for_all_types(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 120))
    settings = Settings(corpus=text, tokens=2048, prove=False)
    found = export_model(folder, tmp_path / "out", [], ["q8_0", "q4_0", "iq4_nl", "fp16"], settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fp16", "pico-iq4_nl.gguf", "pico-q4_0.gguf", "pico-q4_0.imatrix", "pico-q8_0.gguf"
    ]  # fmt: skip
    plain = export_model(folder, tmp_path / "plain", [], ["iq4_nl", "q8_0"], Settings(prove=False))
    assert all(isinstance(one, Exported) for one in (*found, *plain))
    sums = {one.report.quant: one.report.sha256 for one in found}  # type: ignore[union-attr]
    beside = {one.report.quant: one.report.sha256 for one in plain}  # type: ignore[union-attr]
    assert sums["q8_0"] == beside["q8_0"]
    assert sums["iq4_nl"] != beside["iq4_nl"]


def test_one_importance_matrix_for_files_that_are_split(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 120))
    settings = Settings(corpus=text, tokens=2048, rounding="imatrix", split_max_size="60KB", prove=False)
    export_model(folder, tmp_path / "out", [], ["q4_0", "iq4_nl"], settings)
    assert len(list((tmp_path / "out").glob("*-00001-of-*.gguf"))) == 2
    assert [path.name for path in (tmp_path / "out").glob("*.imatrix")] == ["pico-q4_0.imatrix"]


@pytest.mark.parametrize("quant", ["f16", "fp16"])
def test_what_is_not_the_model_gets_no_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    other = make(tmp_path / "other", layout="per-layer", seed=5)
    for name in ("prove_gguf", "prove_onnx"):
        real = getattr(request, name)
        monkeypatch.setattr(request, name, lambda file, _, *rest, real=real, **more: real(file, other, *rest, **more))
    with pytest.raises(Failed, match=r"is not the model|does not reproduce"):
        export_model(folder, tmp_path / "out" / "x", [], [quant], Settings())
    assert not (tmp_path / "out").exists()
