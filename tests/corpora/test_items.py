"""Items of five kinds from JSON lines, and what is said of lines that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cusprun.corpora.items import Item, read_item, read_items
from cusprun.errors import InvalidRequest

GOOD: list[dict[str, Any]] = [
    {"kind": "choice", "prompt": "Who pays?", "choices": ["The tenant", "Nobody"], "answer": "A"},
    {"prompt": "Who pays?", "choices": ["The tenant", "Nobody"], "answer": "Nobody"},
    {"kind": "qa", "prompt": "Capital of Italy?", "answers": ["Rome", "Roma"], "until": ["\n"]},
    {"kind": "classification", "prompt": "Good?", "labels": ["yes", "no"], "answer": "no"},
    {"kind": "summarization", "prompt": "Sum up: a b c", "source": "a b c", "reference": "a"},
    {"kind": "translation", "prompt": "The cat sleeps.", "reference": "Die Katze schläft."},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_kind_is_read(tmp_path: Path) -> None:
    assert read_items(write(tmp_path / "items.jsonl", GOOD)) == [
        Item("choice", "Who pays?", ("The tenant", "Nobody"), 0),
        Item("choice", "Who pays?", ("The tenant", "Nobody"), 1),
        Item("qa", "Capital of Italy?", references=("Rome", "Roma"), until=("\n",)),
        Item("classification", "Good?", ("yes", "no"), 1),
        Item("summarization", "Sum up: a b c", references=("a",), source="a b c"),
        Item("translation", "The cat sleeps.", references=("Die Katze schläft.",), source="The cat sleeps."),
    ]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"kind": "qa", "prompt": "one\u2028two", "answers": ["x"]}])
    assert read_items(path)[0].prompt == "one\u2028two"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "an object with kind, not list"),
        ({"prompt": "p"}, "kind None: write choice, qa"),
        ({"kind": ["qa"], "prompt": "p"}, "kind .'qa'.: write choice, qa"),
        ({"kind": "qa", "prompt": "p"}, "a qa item has prompt, answers; answers is missing"),
        ({"kind": "qa", "prompt": "p", "answers": []}, "one answer or more"),
        ({"kind": "qa", "prompt": "p", "answers": "Rome"}, "one answer or more"),
        ({"kind": "qa", "prompt": " ", "answers": ["x"]}, "prompt has to be a text"),
        ({"kind": "qa", "prompt": "p", "answers": ["x"], "until": "stop"}, "until has to be a list"),
        ({"kind": "choice", "prompt": "p", "choices": ["a", "b"], "answer": 2}, "answer has to be the index"),
        ({"kind": "choice", "prompt": "p", "choices": ["a", ""], "answer": 0}, "at least two answers"),
        ({"kind": "classification", "prompt": "p", "labels": ["a", "a"], "answer": "a"}, "two different texts"),
        ({"kind": "classification", "prompt": "p", "labels": ["a", "b"], "answer": "c"}, "'c' is none of the labels"),
        ({"kind": "summarization", "prompt": "p", "reference": 3}, "reference has to be a text"),
    ],
)
def test_what_is_no_item_is_said_with_its_line(row: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"items:7: .*{message}"):
        read_item(row, "items:7")


def test_all_bad_lines_stand_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"kind": "qa"}, GOOD[0], {"kind": "riddle"}])
    with pytest.raises(InvalidRequest, match=r"(?s)items.jsonl:1: .*items.jsonl:3: kind 'riddle'"):
        read_items(path)
    with pytest.raises(InvalidRequest, match="and 5 more lines"):
        read_items(write(tmp_path / "many.jsonl", [{"kind": "qa"}] * 25))


def test_what_holds_no_items_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"write a \.jsonl file"):
        read_items(tmp_path / "items.csv")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match="no held-out questions"):
        read_items(tmp_path)
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(InvalidRequest, match=r"broken\.jsonl:1 is not JSON .* each line is an object with kind"):
        read_items(tmp_path / "broken.jsonl")


def test_an_expert_s_own_questions(tmp_path: Path) -> None:
    stages = tmp_path / ".stages"
    stages.mkdir()
    question = {"prompt": "Who pays?", "choices": ["a", "b"], "answer": 1}
    write(stages / "texts.jsonl", [{"text": "scenario", "documents": ["d"]}, {"question": question}])
    assert read_items(tmp_path) == [Item("choice", "Who pays?", ("a", "b"), 1)]
    write(stages / "texts.jsonl", [{"text": "scenario", "documents": ["d"]}])
    with pytest.raises(InvalidRequest, match="built without held-out questions"):
        read_items(tmp_path)
