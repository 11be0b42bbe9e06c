"""Tiny artifacts that the tests of this room run: a folder, the same as .gguf, and another model of its shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from tests import pico

UNICODE = (
    "Straße, naïve, señor; 日本語のテキスト, 한국어, العربية, ไทย, 🙂👩‍👩‍👧‍👦🇩🇪, e\u0301, zero\u200bwidth, ½²\n\n\ttab."
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save_model(tmp_path_factory.mktemp("benchmarks") / "pico")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save_model(tmp_path_factory.mktemp("benchmarks") / "other", seed=1)


@pytest.fixture(scope="session")
def gguf(folder: Path) -> Path:
    out = folder.parent / "pico-f32.gguf"
    export_gguf(folder, out, "f32")
    return out


@pytest.fixture(scope="session")
def onnx(folder: Path) -> Path:
    out = folder.parent / "onnx-int4"
    export_onnx(folder, out, "int4")
    return out


@pytest.fixture(scope="session")
def text() -> str:
    return "\n".join(pico.SENTENCES * 3) + UNICODE
