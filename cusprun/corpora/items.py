"""Items with known answers that an artifact is asked: a user's own as JSON lines, or an expert's held-out questions.

Each line of a file is one object whose ``kind`` says what else it has:

    {"kind": "choice", "prompt": text, "choices": [text, ...], "answer": index, letter or wording}
    {"kind": "qa", "prompt": text, "answers": [text, ...]}
    {"kind": "classification", "prompt": text, "labels": [text, ...], "answer": label}
    {"kind": "summarization", "prompt": text, "reference": text, "source": text}
    {"kind": "translation", "prompt": text, "reference": text, "source": text}

``kind`` may be left out of a choice. ``source`` is the text to be summed up or translated, which the baselines read; it
may be left out where the prompt is that text and no more. Items that are generated may have ``until``: texts that end
an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.corpora.own import jsonl_rows, read_row
from cusprun.corpora.selection import read_texts
from cusprun.errors import InvalidRequest

FIELDS: dict[str, tuple[str, ...]] = {
    "choice": ("prompt", "choices", "answer"),
    "qa": ("prompt", "answers"),
    "classification": ("prompt", "labels", "answer"),
    "summarization": ("prompt", "reference"),
    "translation": ("prompt", "reference"),
}
PROBLEMS = 20  # named in one message


@dataclass(frozen=True)
class Item:
    """One question; ``choices`` and ``answer`` of a choice or a classification, ``references`` of the others."""

    kind: str  # one of FIELDS
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    references: tuple[str, ...] = ()  # of qa every answer that counts as right
    source: str = ""
    until: tuple[str, ...] = ()


def read_items(path: Path) -> list[Item]:
    """The items of a .jsonl file, or the held-out questions of an expert's folder.

    Raises InvalidRequest that names every line which is no item, or the folder that holds none.
    """
    if path.is_dir():
        return _held_out(path)
    if path.suffix.lower() != ".jsonl":
        raise InvalidRequest(f"{path}: write a .jsonl file of items or the folder of an expert")
    items: list[Item] = []
    problems = []
    for where, row in jsonl_rows(path, f"each line is an object with kind, one of {', '.join(FIELDS)}"):
        try:
            items.append(read_item(row, where))
        except InvalidRequest as error:
            problems.append(str(error))
    if len(problems) > PROBLEMS:
        problems[PROBLEMS:] = [f"and {len(problems) - PROBLEMS} more lines of {path}"]
    if problems:
        raise InvalidRequest.together(problems)
    return items


def read_item(row: Any, where: str) -> Item:
    """One line of a file. Raises InvalidRequest that names ``where`` and what the line lacks."""
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{where}: an item is an object with kind, not {type(row).__name__}")
    kind = row.get("kind", "choice" if "choices" in row else None)
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InvalidRequest(f"{where}: kind {kind!r}: write {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS[kind] if name not in row]:
        raise InvalidRequest(f"{where}: a {kind} item has {', '.join(FIELDS[kind])}; {', '.join(missing)} is missing")
    prompt, until = _text(row, "prompt", where), row.get("until", [])
    if not isinstance(until, list) or not all(isinstance(end, str) and end for end in until):
        raise InvalidRequest(f"{where}: until has to be a list of texts")
    if kind in ("choice", "classification"):
        return _labelled(kind, row, where)
    if kind == "qa":
        answers = row["answers"]
        if not _texts(answers) or not answers:
            raise InvalidRequest(f"{where}: answers has to be a list of one answer or more")
        return Item(kind, prompt, references=tuple(answers), until=tuple(until))
    source = _text(row, "source", where) if "source" in row else prompt
    return Item(kind, prompt, references=(_text(row, "reference", where),), source=source, until=tuple(until))


def _labelled(kind: str, row: Mapping[str, Any], where: str) -> Item:
    if kind == "classification":
        if not _texts(row["labels"]) or len(set(row["labels"])) < max(2, len(row["labels"])):
            raise InvalidRequest(f"{where}: labels has to be a list of at least two different texts")
        if row["answer"] not in row["labels"]:
            raise InvalidRequest(f"{where}: answer {row['answer']!r} is none of the labels")
        labels = tuple(row["labels"])
        return Item(kind, row["prompt"], choices=labels, answer=labels.index(row["answer"]))
    if not _texts(row["choices"]):
        raise InvalidRequest(f"{where}: choices has to be a list of at least two answers")
    ((_, _, question),) = read_row({name: row[name] for name in FIELDS[kind]}, where)
    assert question is not None
    return Item(kind, question.prompt, choices=question.choices, answer=question.answer)


def _held_out(folder: Path) -> list[Item]:
    for name in ("texts.jsonl", "texts-trimmed.jsonl"):
        path = folder / ".stages" / name
        if path.is_file():
            try:
                _, asked = read_texts(path)
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequest(f"{path} is damaged ({error}): build the expert again") from error
            if not asked:
                raise InvalidRequest(f"{folder} was built without held-out questions: write a .jsonl file of your own")
            return [Item("choice", question.prompt, question.choices, question.answer) for question in asked]
    raise InvalidRequest(f"{folder} holds no held-out questions: write the folder of an expert, or a .jsonl file")


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not re.search(r"\S", value):
        raise InvalidRequest(f"{where}: {name} has to be a text")
    return value


def _texts(value: Any) -> bool:
    """Whether this is a list of texts, none of them empty."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(text, str) and text.strip() for text in value)
    )
