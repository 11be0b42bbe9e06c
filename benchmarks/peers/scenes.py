"""The scenarios that studies run on, the held-out texts each is measured on, and text files made for one study.

A scene may be calibrated on something else than it is measured on: that is what most studies compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cusprun.corpora.catalog import make_scenario
from cusprun.corpora.document import Document, Scenario
from cusprun.corpora.own import join_turns, parse_own_text
from cusprun.corpora.sampling import calibration_entries, cell, dimension_corpora, general_text
from cusprun.corpora.selection import Selection
from cusprun.errors import InvalidRequest
from cusprun.files import written_whole

QUESTIONS = 1000  # at most kept with the held-out texts; a study asks as many as it wants of them


@dataclass(frozen=True)
class Scene:
    """A scenario by its flags. ``made`` names a text file of MADE that is written for it and joins its ``corpus``."""

    name: str
    lang: str | None = None
    domain: str | None = None
    task: str | None = None
    corpus: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    made: str | None = None
    of: str | None = None  # the scene that the made file is written for

    def flags(self) -> dict[str, Any]:
        """As `cusprun-edge prune` takes them, without those not given and without the made file."""
        given: dict[str, Any] = {"lang": self.lang, "domain": self.domain, "task": self.task}
        given |= {"corpus": self.corpus, "include": self.include}
        return {name: value for name, value in given.items() if value}

    @property
    def scenario(self) -> Scenario:
        return make_scenario(self.lang, self.domain, self.task)

    def selection(self, window: int) -> Selection:
        """What decides the held-out texts; its calibration windows are few and serve nothing."""
        own = tuple(map(parse_own_text, self.corpus))
        tokens = 32 * window
        return Selection(self.scenario, own, {}, self.include, tokens, window, QUESTIONS, 0)


EN_LEGAL_QA = Scene("en-legal-qa", "en", "legal", "qa")
EN_SCIENCE_SUMMARIZATION = Scene("en-science-summarization", "en", "science", "summarization")
DE_SOFTWARE_QA = Scene("de-software-qa", "de", "software", "qa")
SCENES = (EN_LEGAL_QA, EN_SCIENCE_SUMMARIZATION, DE_SOFTWARE_QA)


def own_scene(path: Path) -> Scene:
    """The user's own text as a scenario; its domain is one that the catalog has no text for, so no other joins."""
    return Scene(path.stem, domain=f"own-{path.stem}", corpus=(str(path),))


def find_scenes(names: Iterable[str], scenes: Iterable[Scene]) -> list[Scene]:
    """Scenes of these names. Raises InvalidRequest naming those there are."""
    by_name = {scene.name: scene for scene in scenes}
    if missing := [name for name in names if name not in by_name]:
        raise InvalidRequest(f"--scenario {missing[0]}: write one of {', '.join(by_name)}")
    return [by_name[name] for name in names]


@cache
def selection_key(scene: Scene, window: int) -> str:
    """Hash of everything that decides which held-out text a scene has."""
    return scene.selection(window).key()


# text files that a study calibrates on --------------------------------------------------------------------------------


def general_rows(scene: Scene) -> list[dict[str, Any]]:
    """General calibration text of the scene's language: what the share of --general is taken from."""
    own = tuple(map(parse_own_text, scene.corpus))
    return [{"text": item.document.text} for item in general_text(scene.scenario, own, named=scene.include)]


def conversation_rows(scene: Scene) -> list[dict[str, Any]]:
    """The scene's question-and-answer documents as turns, which the chat template renders."""
    return [
        {"messages": [{"role": turn.role, "content": turn.content} for turn in document.turns]}
        for document in _answered(scene)
    ]


def plain_rows(scene: Scene) -> list[dict[str, Any]]:
    """The same documents as running text: question, blank line, answer."""
    return [{"text": join_turns(document.turns)} for document in _answered(scene)]


def question_rows(scene: Scene) -> list[dict[str, Any]]:
    """The same documents without their answers."""
    return [
        {"messages": [{"role": turn.role, "content": turn.content} for turn in document.turns[:-1]]}
        for document in _answered(scene)
    ]


MADE: dict[str, Callable[[Scene], list[dict[str, Any]]]] = {
    "general": general_rows,
    "conversations": conversation_rows,
    "plain": plain_rows,
    "questions": question_rows,
}


def made_scene(kind: str, scene: Scene) -> Scene:
    """Calibration on the text file ``kind`` of ``scene`` alone."""
    return Scene(f"{kind}-of-{scene.name}", domain=f"only-{kind}", made=kind, of=scene.name)


def made_path(kind: str, scene: Scene, folder: Path, window: int) -> Path:
    """Where the text file lies; its name changes with what it is made of."""
    key = hashlib.sha256(f"{selection_key(scene, window)}{kind}".encode()).hexdigest()
    return folder / f"{kind}-{scene.name}-{key[:12]}.jsonl"


def write_made(kind: str, scene: Scene, path: Path) -> None:
    """Writes the text file. Raises InvalidRequest where the scene has no such text."""
    rows = MADE[kind](scene)
    if not rows:
        raise InvalidRequest(f"{scene.name} has no {kind} text to calibrate on")
    with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _answered(scene: Scene) -> list[Document]:
    """Calibration documents of the scene's own cell that end in the assistant's turn, each once."""
    names = {entry.name for entry in cell(scene.scenario, scene.include)}
    names &= {entry.name for entry in calibration_entries(scene.scenario, scene.include)}
    found: dict[str, Document] = {}
    for documents in dimension_corpora(scene.scenario, named=scene.include).values():
        for item in documents:
            document = item.document
            if document.entry in names and len(document.turns) > 1 and document.turns[-1].role == "assistant":
                found.setdefault(document.id, document)
    return list(found.values())
