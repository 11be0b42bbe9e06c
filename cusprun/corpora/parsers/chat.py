"""Evaluation samples as OpenAI Evals keeps them: jsonl rows of chat messages and an ideal answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from cusprun.corpora.document import Question
from cusprun.corpora.own import LETTERS, question_turns
from cusprun.corpora.parsers import Draft, Members, Options, pair
from cusprun.corpora.text import clean

_LABEL = r"\(?(?P<letter>[A-Ha-h])\s?[.:)]\s*"
_ON_LINES = re.compile(rf"(?:^|\n)[ \t]*{_LABEL}")
_INLINE = re.compile(rf"(?:^|\s){_LABEL}")
_ANSWER = re.compile(r"^(?:the (?:correct|final) (?:option|answer) is:?\s*)?[\[(]?\s*([A-Ha-h])\b", re.IGNORECASE)


def parse_choices(members: Members, options: Options) -> Iterator[Draft]:
    """Multiple-choice items. Options: ``only`` is a pattern that an item has to contain ``fewest`` times (1) or more,
    ``except`` one that it must not contain as often."""
    seen: set[str] = set()
    for _, row in _rows(members):
        asked = str(row["question"]) if "question" in row else str(row["input"][-1]["content"])
        ideal = row.get("answer", row.get("ideal"))
        ideal = str(ideal[0] if isinstance(ideal, list) and ideal else ideal)
        if "only" in options and not _contains(asked, options["only"], options):
            continue
        if "except" in options and _contains(asked, options["except"], options):
            continue
        question = read_question(clean(asked), ideal)
        if question is None:
            continue
        turns = question_turns(question)
        text = f"{turns[0].content}\n\n{turns[1].content}"
        if (key := _key(text)) not in seen:
            seen.add(key)
            yield Draft(key, text, turns, question)


def read_question(asked: str, ideal: str) -> Question | None:
    """The question in a text with lettered choices, on lines of their own or inline; None for any other text."""
    asked = re.sub(r"\s*Answer:\s*$", "", asked)
    asked = re.sub(r"^Subject: .*\n+", "", asked)
    answer = _ANSWER.match(ideal.strip())
    if answer is None:
        return None
    for pattern, tail in ((_ON_LINES, "\n\n"), (_INLINE, "\n")):
        marks: list[re.Match[str]] = []
        for mark in pattern.finditer(asked):
            if mark["letter"].upper() == LETTERS[len(marks)]:
                marks.append(mark)
        if len(marks) >= 2:
            ends = [mark.start() for mark in marks[1:]] + [len(asked)]
            choices = [asked[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
            choices[-1] = choices[-1].split(tail)[0].strip()
            prompt, index = asked[: marks[0].start()].strip(), LETTERS.index(answer[1].upper())
            if prompt and all(choices) and index < len(choices) and len(set(choices)) == len(choices):
                return Question(prompt, tuple(choices), index)
    return None


def parse_pairs(members: Members, options: Options) -> Iterator[Draft]:
    """Instruction and answer. Options: ``instruction`` replaces the samples' own, ``without`` skips answers."""
    seen: set[str] = set()
    for _, row in _rows(members):
        contents = [str(message["content"]) for message in row["input"]]
        if "instruction" in options:
            contents[0] = options["instruction"]
        ideal = row["ideal"]
        answered = clean(", ".join(map(str, ideal)) if isinstance(ideal, list) else str(ideal))
        asked = clean("\n\n".join(contents))
        answered = answered.strip("[]")
        if not answered or ("without" in options and re.search(options["without"], answered)):
            continue
        if (key := _key(asked)) not in seen:
            seen.add(key)
            yield pair(key, asked, answered)


def parse_field(members: Members, options: Options) -> Iterator[Draft]:
    """Running text in one field of each row. Options: ``field``, a name or a path such as ``input.1.content``;
    ``shortest`` is the least number of characters (200)."""
    seen: set[str] = set()
    for _, row in _rows(members):
        value: Any = row
        for step in str(options["field"]).split("."):
            value = value[int(step)] if isinstance(value, list) else value[step]
        text = clean(str(value))
        if len(text) >= options.get("shortest", 200) and (key := _key(text)) not in seen:
            seen.add(key)
            yield Draft(key, text)


def _rows(members: Members) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, data in members:
        for line in data.decode("utf-8").split("\n"):
            if line.strip():
                yield name, json.loads(line)


def _contains(text: str, pattern: str, options: Options) -> bool:
    return len(re.findall(pattern, text, re.IGNORECASE)) >= options.get("fewest", 1)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
