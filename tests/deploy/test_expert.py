"""Experts' folders that are damaged: one message each, which says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cusprun.deploy.expert import read_expert
from cusprun.errors import InvalidRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    expert = tmp_path / "expert"
    (expert / "model").mkdir(parents=True)
    (expert / "model" / "config.json").write_text("{}")
    (expert / "pico.gguf").write_bytes(b"GGUF")
    write(expert)
    return expert


def write(folder: Path, change: Callable[[dict[str, Any]], object] = lambda card: None) -> None:
    card = {
        "name": "pico",
        "base": {"id": "pico-llama", "parameters": 4},
        "expert": {"parameters": 3},
        "method": {"name": "refit"},
        "artifacts": [{"path": "pico.gguf", "format": "gguf", "quant": "q8_0", "bytes": 4, "sha256": "0" * 64}],
        "unknown": "of a later version",
    }
    change(card)
    (folder / "expert.json").write_text(json.dumps(card))


def refused(folder: Path) -> str:
    with pytest.raises(InvalidRequest) as error:
        read_expert(folder)
    return str(error.value)


def test_what_is_read(folder: Path) -> None:
    found = read_expert(folder)
    assert (found.name, found.report, found.card["unknown"]) == ("pico", None, "of a later version")
    assert [(one.path, one.format, one.quant, one.bytes) for one in found.artifacts] == [
        (folder / "pico.gguf", "gguf", "q8_0", 4)
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [("../outside", "lies outside"), ("/etc/hostname", "lies outside"), ("gone.gguf", "is not there")],
)
def test_an_artifact_in_the_wrong_place_is_said_as_it_is(folder: Path, path: str, message: str) -> None:
    write(folder, lambda card: card["artifacts"][0].update(path=path))
    said = refused(folder)
    assert said.startswith(f"expert.json lists {path}, which {message}")
    assert "damaged" not in said


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda card: card.pop("base"), "base: Field required"),
        (lambda card: card.update(base="pico-llama"), "base: "),
        (lambda card: card["base"].pop("id"), r"base.id: Field required"),
        (lambda card: card["base"].update(parameters=0), "base.parameters: Input should be greater than 0"),
        (lambda card: card.pop("expert"), "expert: Field required"),
        (lambda card: card.update(expert=[3]), "expert: "),
        (lambda card: card["expert"].pop("parameters"), "expert.parameters: Field required"),
        (lambda card: card["expert"].update(parameters="3"), "expert.parameters: "),
        (lambda card: card.update(scenario="legal"), "scenario: "),
        (lambda card: card.update(method="refit"), "method: "),
        (lambda card: card.update(name=3), "name: "),
        (lambda card: card.update(artifacts={}), "artifacts: "),
        (lambda card: card["artifacts"][0].pop("sha256"), "artifacts.0.sha256: Field required"),
    ],
)
def test_a_card_that_is_damaged(folder: Path, change: Callable[[dict[str, Any]], object], where: str) -> None:
    write(folder, change)
    assert refused(folder).startswith(f"{folder / 'expert.json'} is damaged: {where}")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 10**5])
def test_a_card_that_is_none(folder: Path, content: bytes) -> None:
    (folder / "expert.json").write_bytes(content)
    assert "expert.json is damaged: " in refused(folder)
