"""Sample answers: which prompts, and that both artifacts answer them greedily as they ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.benchmarks.samples import COUNT, OPENING, Prompt, answers, prompts, sample_answers
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Message, Sampling, open_runtime
from tests.benchmarks.test_tasks import Item

ASKED = [Prompt("Who pays the rent?", "A. The tenant.", turn=True), Prompt("The court decides", None, turn=False)]


def test_first_questions_with_their_choices() -> None:
    items = [Item(f"Question {number}?", ("yes", "no"), number % 2) for number in range(9)]
    found = prompts({"scenario": ["text"]}, items)
    assert len(found) == COUNT
    assert found[1] == Prompt("Question 1?\nA. yes\nB. no", "B. no", turn=True)


def test_openings_of_documents_where_there_are_no_questions() -> None:
    documents = [f"{number} " + "The tenant pays. " * 60 for number in range(9)]
    found = prompts({"general": ["other"], "scenario": ["short", *documents]}, [])
    assert len(found) == COUNT
    for prompt, document in zip(found, documents, strict=False):
        assert document.startswith(prompt.text)
        assert OPENING // 2 < len(prompt.text) <= OPENING
        assert prompt.reference
        assert document[len(prompt.text) :].strip().startswith(prompt.reference)
        assert not prompt.turn
    short = "The tenant pays the rent on the first day."
    expected = [Prompt("The tenant pays the", "rent on the first day.", turn=False)]
    assert prompts({"general": [short, ""]}, []) == expected
    assert prompts({}, []) == []


def test_both_answer_as_they_ship(gguf: Path, other: Path) -> None:
    rows = sample_answers(other, gguf, ASKED, longest=6)
    assert [(row["prompt"], row["reference"]) for row in rows] == [(one.text, one.reference) for one in ASKED]
    for who, path in (("dense", gguf), ("expert", other)):
        runtime = open_runtime(path)
        turn = runtime.encode(runtime.chat_prompt([Message("user", ASKED[0].text)]), special=True)
        text = runtime.encode(ASKED[1].text)
        for row, tokens in zip(rows, (turn, text), strict=True):
            lead = [] if runtime.bos is None or tokens[:1] == [runtime.bos] else [runtime.bos]
            said = runtime.decode(list(runtime.generate([*lead, *tokens], Sampling(max_tokens=6)))).strip()
            assert row[who] == said
        runtime.close()
    assert rows[0]["dense"] != rows[0]["expert"]


def test_a_prompt_that_is_too_long_and_no_length(gguf: Path) -> None:
    (said,) = answers(gguf, [Prompt("The tenant pays the rent. " * 200, None, turn=False)], longest=4)
    assert isinstance(said, str)
    with pytest.raises(InvalidRequest, match="write 1 or more"):
        answers(gguf, ASKED, longest=0)
