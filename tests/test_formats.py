"""Which types are written for what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cusprun.errors import InvalidRequest
from cusprun.formats import bits_of, block_of, format_of, resolve, types_of
from cusprun.recipe import make_recipe, read_recipe


@pytest.mark.parametrize(
    ("formats", "types", "found"),
    [
        ((), (), ("q8_0",)),
        ((), ("q4_0,int4",), ("q4_0", "int4")),
        ((), ("int8", "f16"), ("int8", "f16")),
        (("onnx",), (), ("int4",)),
        (("gguf,onnx",), (), ("q8_0", "int4")),
        (("gguf", "onnx"), ("int8",), ("int8", "q8_0")),
        (("gguf,onnx",), ("q4_k_m,int4",), ("q4_k_m", "int4")),
    ],
)
def test_types_to_write(formats: tuple[str, ...], types: tuple[str, ...], found: tuple[str, ...]) -> None:
    assert resolve(formats, types) == found
    given = {key: value for key, value in (("format", formats), ("quant", types)) if value}
    assert make_recipe({"lang": "en", **given}).quant == found


@pytest.mark.parametrize(
    ("formats", "types", "message"),
    [
        (("gguf",), ("int8",), "write --format onnx, or one of f32 f16"),
        (("onnx",), ("q8_0",), "write --format gguf, or one of fp32"),
        (("tflite",), (), "write gguf or onnx"),
        ((), ("q9",), "for GGUF write one of f32 .* for ONNX one of fp32"),
        ((), ("int4", "int4"), "names a type twice"),
    ],
)
def test_refused(formats: tuple[str, ...], types: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        resolve(formats, types)
    given = {key: value for key, value in (("format", formats), ("quant", types)) if value}
    with pytest.raises(InvalidRequest, match=rf"{message}|'{(*formats, *types)[0]}' is not one of"):
        make_recipe({"lang": "en", **given})


def test_a_recipe_keeps_what_was_resolved(tmp_path: Path) -> None:
    make_recipe({"lang": "en", "format": ("onnx",)}).save(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["quant"] == ["int4"]
    assert read_recipe(tmp_path / "recipe.yaml", {}).quant == ("int4",)


def test_every_type_has_its_sizes() -> None:
    for format in ("gguf", "onnx"):
        for quant in types_of(format):
            assert format_of(quant) == format
            assert 2 < bits_of(quant) <= 32
            assert block_of(quant) in (32, 256)
