"""Reads what builds left: report.json, recipe.yaml and expert.json of each folder, checked before anything is drawn."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cusprun.benchmarks.report import SCHEMA_VERSION
from cusprun.benchmarks.report_page.schema import CardFile, ReportFile
from cusprun.errors import InvalidRequest, reason_of

SCENARIO = "scenario"
UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Measured:
    """One report of one folder: an expert in one type; ``recipe`` and ``card`` (expert.json) where they are there."""

    name: str
    folder: Path
    path: Path  # of its report.json
    report: Mapping[str, Any]
    recipe: str | None
    card: Mapping[str, Any] | None

    @property
    def quant(self) -> str:
        """The type of the expert's file."""
        return str(self.report["speed"]["expert"]["quant"])

    @property
    def base(self) -> str:
        """The dense model's name."""
        return str(self.card["base"]["id"]) if self.card is not None else "the dense model"

    @property
    def base_key(self) -> str | None:
        """What tells base models apart: the sha256 of the weights, in old records the id; None without a card."""
        return None if self.card is None else str(self.card["base"].get("sha256") or self.card["base"]["id"])

    @property
    def text(self) -> str:
        """The held-out text that stands for the scenario; the first where none has that name."""
        corpora = self.report["quality"]["corpora"]
        return SCENARIO if SCENARIO in corpora else next(iter(corpora), SCENARIO)

    def held_out(self) -> str | None:
        """What two reports have in common whose bits per byte of :attr:`text` compare; None where nobody can say."""
        entry = self.report["quality"]["corpora"].get(self.text)
        rows = [
            row.get("sha256")
            for row in self.report["corpora"]
            if row.get("side") == "held-out" and row.get("text") == self.text
        ]
        if entry is None or "dense" not in entry or not rows or None in rows or self.base_key is None:
            return None
        dense = entry["dense"]  # windows are cut in its tokens, as many of them as were asked for
        score = self.report["quality"]["score"]
        return json.dumps([sorted(map(str, rows)), self.text, self.base_key, dense["tokens"], dense["context"], score])

    def dense_key(self) -> tuple[Any, ...]:
        """The same for reports that were held against the same dense file."""
        dense = self.report["speed"]["dense"]
        bits = self.report["quality"]["corpora"][self.text]["dense"]["bits_per_byte"]
        return (self.base_key, dense["format"], dense["quant"], dense["file_bytes"], bits)


def read_experts(folders: Sequence[Path]) -> list[Measured]:
    """Every report of the folders, in their order, the expert's first type first; names that are alike are told apart.

    Raises one InvalidRequest with everything that is no report: no report/report.json, damaged, another schema.
    """
    found: list[Measured] = []
    problems = []
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            problems.append(f"{folder} is given twice: name each folder once")
            continue
        seen.add(folder.resolve())
        try:
            found += read_expert(folder)
        except InvalidRequest as error:
            problems.append(str(error))
    if problems:
        raise InvalidRequest.together(problems)
    return _told_apart(found)


def read_expert(folder: Path) -> list[Measured]:
    """The reports of one folder: of its first type, then of the others that its expert.json lists."""
    first = folder / "report" / "report.json"
    if not first.is_file():
        raise InvalidRequest(
            f"{folder} has no report/report.json: name a folder that `cusprun-edge build` left and measured"
        )
    card = _card(folder / "expert.json")
    recipe = folder / "recipe.yaml"
    try:
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{recipe} is damaged ({error}): build the expert again") from error
    paths = [first]
    if card is not None:
        there = {path.parent.name: path for path in sorted((folder / "report").glob("*/report.json"))}
        paths += [there[entry["quant"]] for entry in card["artifacts"][1:] if entry["quant"] in there]
    reports = {path: read_report(path) for path in paths}
    name = reports[first]["scenario"].get("name") or folder.resolve().name
    return [Measured(str(name), folder, path, report, text, card) for path, report in reports.items()]


def read_report(path: Path) -> dict[str, Any]:
    """A report.json as it is. Raises InvalidRequest where it is damaged or of another schema."""
    value = _json(path)
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InvalidRequest(
            f"{path} has schema_version {version} and this cusprun reads {SCHEMA_VERSION}: build the expert again or "
            "take the cusprun that wrote it"
        )
    _check(path, ReportFile, value)
    return value


def _card(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = _json(path)
    _check(path, CardFile, value)
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is damaged ({error}): build the expert again") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} is damaged (it holds no JSON object): build the expert again")
    cleaned: dict[str, Any] = _cleaned(value)
    return cleaned


def _check(path: Path, model: type[BaseModel], value: dict[str, Any]) -> None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"{path} is damaged ({where}: {first['msg']}): build the expert again") from error


def _told_apart(experts: list[Measured]) -> list[Measured]:
    """A name that several have gets the type behind it, and where that is not enough the folder."""
    for more in (lambda expert: expert.quant, lambda expert: f"({_cleaned(str(expert.folder))})"):
        count = Counter(expert.name for expert in experts)
        experts = [
            replace(expert, name=f"{expert.name} {more(expert)}") if count[expert.name] > 1 else expert
            for expert in experts
        ]
    return experts


def _cleaned(value: Any) -> Any:
    """Every string without what no page can hold: control characters and halves of surrogate pairs."""
    if isinstance(value, str):
        return UNREADABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value
