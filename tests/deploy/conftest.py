"""A tiny expert as `build` leaves it, measured, with a GGUF and an ONNX artifact."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests import pico


@pytest.fixture(scope="session")
def pico_expert(tmp_path_factory: pytest.TempPathFactory, own_text: Path) -> Path:
    """The folder of a per-layer Llama expert named pico-legal: gguf/ in q8_0, onnx/int4, report.json. Read only.

    Tests that run side by side share it: the first that asks builds it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pico-expert"
    with FileLock(f"{shared}.lock"):
        if not (shared / "expert").is_dir():
            shared.mkdir(exist_ok=True)
            (_build(shared, own_text)).rename(shared / "expert")
    return shared / "expert"


def _build(folder: Path, own_text: Path) -> Path:
    """The GGUF alone is measured: a build that measures nothing goes on from the stages of one that does."""
    from cusprun.build import build
    from cusprun.recipe import make_recipe

    dense = pico.save_model(folder / "pico-llama")
    (dense / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\nA tiny random model.\n")
    wish: dict[str, Any] = {
        "model": str(dense), "corpus": (str(own_text),), "name": "pico-legal",
        "ratio": 0.3, "tokens": 2048, "window": 64, "align": 8, "rounding": "nearest",
        "eval_tokens": 1024, "repetitions": 2, "threads": 1,
    }  # fmt: skip
    measured, expert = folder / "measured", folder / "both"
    build(make_recipe({**wish, "quant": ("q8_0",), "out": measured}))
    shutil.copytree(measured / ".stages", expert / ".stages")
    build(make_recipe({**wish, "quant": ("q8_0", "int4"), "measure": False, "out": expert}))
    shutil.copytree(measured / "report", expert / "report")
    return expert
