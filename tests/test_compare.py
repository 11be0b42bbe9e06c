"""`compare` on what a build left: its artifacts beside the dense model in every type and a smaller model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cusprun.runtimes.gguf_header import load_metadata
from tests import pico
from tests.benchmarks.test_frontier import ROUNDED
from tests.test_build import command, run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty one, for every command of this file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSPRUN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory, pico_model: Path, own_text: Path, cache: Path) -> Path:
    """An expert with a file of each format, whose ffn_down weighs eight bits in every .gguf."""
    out = tmp_path_factory.mktemp("compare") / "expert"
    run(
        "build", "--model", pico_model, "--corpus", own_text, "--out", out, "--ratio", 0.2, "--tokens", 2048,
        "--window", 64, "--align", 32, "--vocab", "keep", "--format", "gguf,onnx", "--quant", "q4_0,int4",
        "--tensor-type", "ffn_down=q8_0", "--no-measure",
    )  # fmt: skip
    return out


def test_an_expert_beside_the_dense_model_in_every_type(expert: Path, cache: Path, tmp_path: Path) -> None:
    words = ("compare", expert, "--quant", "all", "--no-speed", "--eval-tokens", 1024)
    found = json.loads(run(*words, "--md", tmp_path / "table.md", "--json").stdout)
    rows = found["rows"]
    own = [row for row in rows if row["kind"] == "expert"]
    assert {(row["format"], row["quant"]) for row in own} == {("gguf", "q4_0"), ("onnx", "int4")}
    dense = [row for row in rows if row["kind"] == "dense"]
    assert {row["name"].split()[-1] for row in dense} == ROUNDED | {"int8", "int4"}
    assert len(dense) == len(ROUNDED) + 2
    for row in own:
        assert sum(line.startswith(row["name"]) for line in found["verdicts"]) == 1  # by size alone
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert all(row["name"] in table for row in rows)
    again = run(*words)
    assert "perplexity of" not in again.stderr  # kept
    assert own[0]["name"] in again.stdout


def test_a_smaller_model_is_taken_in_the_same_types(expert: Path, cache: Path, tmp_path: Path) -> None:
    smaller = pico.save_model(tmp_path / "smaller", intermediate_size=96)
    words = ("compare", expert, "--quant", "q4_0,int8", "--smaller", smaller, "--no-speed", "--eval-tokens", 1024)
    rows = json.loads(run(*words, "--json").stdout)["rows"]
    dense = [row for row in rows if row["kind"] == "dense"]
    assert [row["name"].split()[-1] for row in dense] == ["q4_0", "int8"] * 2
    for large, small in zip(dense[:2], dense[2:], strict=True):
        assert small["name"].startswith("smaller")
        assert small["file_bytes"] < large["file_bytes"]


def test_dense_files_are_written_as_the_expert_was(expert: Path, cache: Path) -> None:
    run("compare", expert, "--quant", "q4_0", "--no-speed", "--eval-tokens", 1024)
    (path,) = (path for path in (cache / "dense-gguf").glob("*/pico*-q4_0.gguf"))
    types = {tensor.name: tensor.type.lower() for tensor in load_metadata(path).tensors}
    assert {types[f"blk.{layer}.ffn_down.weight"] for layer in range(3)} == {"q8_0"}
    assert types["blk.0.ffn_up.weight"] == "q4_0"
    assert "gptq" in path.name  # rounded on the expert's calibration text


def test_an_expert_whose_text_is_gone_names_what_to_write(expert: Path, cache: Path) -> None:
    texts = expert / ".stages" / "texts.jsonl"
    texts.rename(texts.with_suffix(".aside"))
    try:
        done = subprocess.run(command("compare", expert, "--no-speed"), capture_output=True, text=True)
    finally:
        texts.with_suffix(".aside").rename(texts)
    assert done.returncode == 2
    assert "name a text with --text FILE" in done.stderr
