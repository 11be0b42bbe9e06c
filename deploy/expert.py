"""The expert that is shipped: its folder read and checked once, for whatever target takes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cusprun.corpora.catalog import LANGUAGES
from cusprun.errors import InvalidRequest

WORDS = {**LANGUAGES, "qa": "question answering"}  # for people, where the scenario's own word is short


Count = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    """What a bundle is written from; whatever else is there goes along unread."""

    model_config = ConfigDict(strict=True)


class _Sizes(_Part):
    parameters: Count


class _Base(_Sizes):
    id: str
    sha256: str | None = None


class _Entry(_Part):
    path: str
    format: str
    quant: str
    bytes: Count
    sha256: str


class _Card(_Part):
    name: str
    scenario: dict[str, Any] | None = None
    base: _Base
    expert: _Sizes
    method: dict[str, Any] | None = None
    artifacts: list[_Entry]


@dataclass(frozen=True)
class Artifact:
    """One export of the expert: a .gguf file, or the folder of an ONNX model."""

    path: Path
    format: str  # "gguf" or "onnx"
    quant: str
    bytes: int
    sha256: str  # of the file, or of the tree (cusprun.files.sha256_tree)


@dataclass(frozen=True)
class Expert:
    """What `cusprun-edge build` left: expert.json, the model folder, the artifacts, the measurements."""

    folder: Path
    name: str
    card: dict[str, Any]  # expert.json
    report: dict[str, Any] | None  # report/report.json, where it was measured
    model: Path  # Hugging Face folder: config, tokenizer, chat template
    artifacts: tuple[Artifact, ...]

    @property
    def purpose(self) -> str:
        """The scenario in words, such as "English, legal, question answering"; empty where it has none."""
        scenario = self.card.get("scenario") or {}
        words = [WORDS.get(str(value), str(value)) for key, value in scenario.items() if key != "name" and value]
        return ", ".join(words)

    def of(self, format: str, quant: str | None = None) -> Artifact:
        """The artifact of a format, of the type ``quant`` or else the first listed. Raises InvalidRequest."""
        found = [one for one in self.artifacts if one.format == format and quant in (None, one.quant)]
        if not found:
            there = ", ".join(f"{one.format} {one.quant}" for one in self.artifacts) or "no artifact"
            wanted = f"{format} {quant}" if quant else format
            raise InvalidRequest(
                f"{self.folder} has {there} and not {wanted}: build it with --format {format}"
                + (f" --quant {quant}" if quant else "")
            )
        return found[0]


def read_expert(folder: Path) -> Expert:
    """Reads an expert's folder.

    Raises InvalidRequest where it is none, where expert.json is damaged, or where an artifact it lists is missing or
    lies outside the folder. What the artifacts hold is not looked at.
    """
    path = folder / "expert.json"
    if not path.is_file():
        raise InvalidRequest(
            f"{folder} is no expert: it has no expert.json; name the folder that `cusprun-edge build --out` wrote"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        known = _Card.model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise InvalidRequest(f"{path} is damaged: {where}: {first['msg']}; build the expert again") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is damaged: {error}; build the expert again") from error
    artifacts = tuple(_artifact(folder, entry) for entry in known.artifacts)
    report = folder / "report" / "report.json"
    if not (folder / "model" / "config.json").is_file():
        raise InvalidRequest(f"{folder} has no model/config.json: build the expert again")
    try:
        measured = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    except ValueError as error:
        raise InvalidRequest(f"{report} is damaged: {error}; build the expert again") from error
    return Expert(folder, known.name, card, measured, folder / "model", artifacts)


def _artifact(folder: Path, entry: _Entry) -> Artifact:
    path = folder / entry.path
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InvalidRequest(f"expert.json lists {entry.path}, which lies outside {folder}: build the expert again")
    if not path.exists():
        raise InvalidRequest(f"expert.json lists {entry.path}, which is not there: build the expert again")
    return Artifact(path, entry.format, entry.quant, entry.bytes, entry.sha256)
