"""The catalog: every text that a build may use, with its tags, licence, source, version and sha256.

Tags decide which corpus an entry may join; ``use`` decides when it joins by itself: ``default`` entries whenever a
dimension matches, ``cell`` entries (large, or in need of npm or apt-get) only in the scenario's own language and
domain, ``named`` entries only when they are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cusprun.corpora.document import Scenario
from cusprun.errors import Failed, InvalidRequest

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
DOMAINS = ("legal", "medical", "science", "software", "general")
TASKS = ("qa", "summarization", "classification", "translation")
ALIASES = {
    "domain": {"law": "legal", "medicine": "medical", "health": "medical", "code": "software"},
    "task": {"question-answering": "qa", "summary": "summarization", "summarisation": "summarization"},
    "language": {name.lower(): code for code, name in LANGUAGES.items()},
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """A pinned package and the members of it that hold the text, with the parser that reads them."""

    kind: Literal["pypi", "npm", "debian"]
    package: str = Field(min_length=1)
    version: str = Field(min_length=1)
    file: str = Field(pattern=r"^[^/\\]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(gt=0)
    members: tuple[str, ...] = Field(min_length=1)
    parser: str
    options: dict[str, Any] = {}


class HubSource(_Strict):
    """A data set of the Hugging Face hub (or a local folder) at a fixed revision, read row by row."""

    kind: Literal["datasets"]
    package: str = Field(min_length=1)
    version: str = Field(min_length=1)
    configuration: str | None = None
    split: str = "train"
    columns: dict[str, str] = {}
    rows: int = Field(default=5000, gt=0)


class Entry(_Strict):
    """One text of the catalog."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = Field(min_length=1)
    language: Literal["en", "de", "fr", "es", "it", "pt"]
    domain: Literal["legal", "medical", "science", "software", "general"]
    task: Literal["qa", "summarization", "classification", "translation"] | None
    licence: str = Field(pattern=r"^(unknown|[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*)$")
    licence_note: str = ""
    attribution: str = Field(min_length=1)
    use: Literal["default", "cell", "named"]
    tried: bool
    family: str = ""
    reserve: Literal["evaluation"] | None = None
    source: Source | HubSource = Field(discriminator="kind")

    @model_validator(mode="after")
    def _unknown_licences_are_named(self) -> Entry:
        if self.licence == "unknown" and self.use != "named":
            raise ValueError(f"{self.name}: an entry of unknown licence needs use: named")
        return self


@lru_cache(maxsize=4)
def load_catalog(path: Path | None = None) -> tuple[Entry, ...]:
    """The entries of ``path`` (the shipped catalog.yaml by default). Raises Failed where the file is not valid."""
    path = path or Path(__file__).with_name("catalog.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = content["entries"]
        entries = tuple(Entry.model_validate(row) for row in rows)
    except (OSError, yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
        raise Failed(f"{path} is not a valid catalog: {error}") from error
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise Failed(f"{path} names these entries twice: {', '.join(twice)}")
    return entries


def find_entries(names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries of these names. Raises InvalidRequest that lists the names there are."""
    entries = {entry.name: entry for entry in load_catalog()}
    missing = [name for name in names if name not in entries]
    if missing:
        raise InvalidRequest(f"no such corpus: {', '.join(missing)}. There are: {', '.join(sorted(entries))}")
    return tuple(entries[name] for name in names)


def make_scenario(language: str | None = None, domain: str | None = None, task: str | None = None) -> Scenario:
    """A scenario in the catalog's words (``English``, ``en-GB`` become ``en``; ``law`` becomes ``legal``).

    Unknown values pass: the user's own text may serve them. :func:`check_scenario` says whether there is text.
    """

    def word(kind: str, value: str | None) -> str | None:
        if value is None or not value.strip():
            return None
        value = value.strip().lower()
        value = ALIASES[kind].get(value, value)
        return value.replace("_", "-").split("-")[0] if kind == "language" else value

    return Scenario(word("language", language), word("domain", domain), word("task", task))


def matches(entry: Entry, dimension: str, value: str) -> bool:
    """Whether the entry has this value in this dimension."""
    return bool(getattr(entry, dimension) == value)


def cell(scenario: Scenario, named: Sequence[str] = ()) -> tuple[Entry, ...]:
    """The scenario's own entries, not counting those kept for evaluation.

    Those that match every given dimension, and running text of the language and domain where these are given: a
    lawyer's questions are asked in the words of the law. Without a task, entries for ``cell`` use join as running text
    only. Entries in ``named`` count as well if they match.
    """
    given = scenario.given()
    found = []
    for entry in load_catalog():
        if entry.reserve or (entry.use == "named" and entry.name not in named):
            continue
        fits = all(matches(entry, name, value) for name, value in given.items() if name != "task")
        running_text = entry.task is None and scenario.language is not None and scenario.domain is not None
        if scenario.task is None:
            right_task = entry.use != "cell" or running_text
        else:
            right_task = entry.task == scenario.task or running_text
        if given and fits and right_task:
            found.append(entry)
    return tuple(found)


def check_scenario(scenario: Scenario, own: bool = False, named: Sequence[str] = ()) -> None:
    """Raises InvalidRequest where the catalog has no text for a dimension, or none in this language and domain.

    With the user's ``own`` text every scenario stands.
    """
    if own or not scenario.given():
        return
    legal_values = {"language": tuple(LANGUAGES), "domain": DOMAINS, "task": TASKS}
    problems = [
        f"there is no text for {dimension} {value!r}; the catalog has {', '.join(legal_values[dimension])}"
        for dimension, value in scenario.given().items()
        if value not in legal_values[dimension]
    ]
    if not problems and not cell(scenario, named):
        pairs = sorted({f"{entry.language}-{entry.domain}" for entry in load_catalog() if not entry.reserve})
        problems.append(f"there is no text for {scenario}; the catalog has text for {', '.join(pairs)}")
    if problems:
        problems[-1] += "\nBring your own with --corpus FILE (txt, md, jsonl or parquet); `cusprun-edge corpora list`"
        raise InvalidRequest.together(problems)
