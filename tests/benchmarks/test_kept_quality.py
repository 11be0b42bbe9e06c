"""Figures of a text are measured once: what is kept is what was measured, and an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cusprun.benchmarks import kept_quality
from cusprun.benchmarks.kept_quality import evaluate_kept
from cusprun.benchmarks.quality import evaluate_corpora
from cusprun.cli import app
from cusprun.exporters.gguf import export_gguf

SETTINGS: dict[str, Any] = {"context": 64, "special": True}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the texts that were really measured; one called ``stop`` interrupts the first time."""
    names: list[str] = []

    def noted(artifact: Path, corpora: dict[str, Any], **settings: Any) -> Any:
        names.extend(corpora)
        if names.count("stop") == 1 and "stop" in corpora:
            raise KeyboardInterrupt
        return evaluate_corpora(artifact, corpora, **settings)

    monkeypatch.setattr(kept_quality, "evaluate_corpora", noted)
    return names


def test_what_is_kept_is_what_was_measured(folder: Path, gguf: Path, text: str, measured: list[str]) -> None:
    texts = {"one": text, "two": [text, text[:600]]}
    expected = evaluate_corpora(gguf, texts, against=folder, **SETTINGS)
    for _ in range(2):
        assert evaluate_kept(gguf, texts, against=folder, **SETTINGS) == expected
    assert measured == ["one", "two"]
    assert evaluate_kept(gguf, texts, against=folder, fresh=True, **SETTINGS) == expected
    assert measured == ["one", "two"] * 2


def other_text(gguf: Path, text: str) -> Any:
    return evaluate_kept(gguf, {"one": text + " more"}, **SETTINGS)


def other_windows(gguf: Path, text: str) -> Any:
    return evaluate_kept(gguf, {"one": text}, **{**SETTINGS, "context": 32})


def held_against(gguf: Path, text: str) -> Any:
    return evaluate_kept(gguf, {"one": text}, against=gguf, **SETTINGS)


@pytest.mark.parametrize("otherwise", [other_text, other_windows, held_against])
def test_what_is_asked_otherwise_is_measured(
    gguf: Path, text: str, measured: list[str], otherwise: Callable[[Path, str], Any]
) -> None:
    evaluate_kept(gguf, {"one": text}, **SETTINGS)
    otherwise(gguf, text)
    assert measured == ["one", "one"]


def test_another_file_of_that_name_is_measured(folder: Path, text: str, measured: list[str], tmp_path: Path) -> None:
    for quant in ("f32", "q8_0"):
        export_gguf(folder, tmp_path / "x.gguf", quant)
        evaluate_kept(tmp_path / "x.gguf", {"one": text}, **SETTINGS)
    assert measured == ["one", "one"]


def test_interrupted_it_goes_on_with_the_next_text(gguf: Path, text: str, measured: list[str]) -> None:
    texts = {"one": text, "stop": text[:900], "last": text[300:]}
    with pytest.raises(KeyboardInterrupt):
        evaluate_kept(gguf, texts, **SETTINGS)
    assert list(evaluate_kept(gguf, texts, **SETTINGS)) == ["one", "stop", "last"]
    assert measured == ["one", "stop", "stop", "last"]


def test_the_command_measures_once_unless_told(gguf: Path, text: str, measured: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    words = ["eval", str(gguf), "--text", str(tmp_path / "t.txt"), "--context", "64"]
    said = [CliRunner().invoke(app, [*words, *more]).stdout for more in ((), (), ("--fresh",))]
    assert said[0] == said[1] == said[2]
    assert "perplexity" in said[0]
    assert len(measured) == 2
