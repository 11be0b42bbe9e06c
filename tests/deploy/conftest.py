"""A tiny expert as `build` leaves it, measured, with a GGUF and an ONNX artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import pico


@pytest.fixture(scope="session")
def pico_expert(tmp_path_factory: pytest.TempPathFactory, own_text: Path) -> Path:
    """The folder of a per-layer Llama expert named pico-legal: gguf/ in q8_0, onnx/int4, report.json. Read only.

    The GGUF is measured; the ONNX model joins in a second build, which measures nothing.
    """
    from cusprun.build import build
    from cusprun.recipe import make_recipe

    folder = tmp_path_factory.mktemp("shipped")
    dense = pico.save_model(folder / "pico-llama")
    (dense / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\nA tiny random model.\n")
    wish: dict[str, Any] = {
        "model": str(dense), "corpus": (str(own_text),), "out": folder / "expert", "name": "pico-legal",
        "ratio": 0.3, "tokens": 2048, "window": 64, "align": 8, "quant": ("q8_0",), "rounding": "nearest",
        "eval_tokens": 1024, "repetitions": 2, "threads": 1,
    }  # fmt: skip
    build(make_recipe(wish))
    build(make_recipe({**wish, "quant": ("q8_0", "int4"), "measure": False}))
    return folder / "expert"
