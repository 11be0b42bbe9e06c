"""The user's own text: what can be read is read, and everything else says what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cusprun.corpora.document import OwnText, Scenario
from cusprun.corpora.own import parse_dimension, parse_own_text, read_own
from cusprun.errors import InvalidRequest

SCENARIO = Scenario("nl", "legal", "qa")


def read(path: Path) -> list:
    return read_own(path, "file:own", SCENARIO)


def test_rows_of_every_form_are_read(tmp_path: Path) -> None:
    rows = [
        {"text": "Running text."},
        {"question": "Who pays?", "answer": "The tenant."},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]},
        {"prompt": "Who pays?", "choices": ["The landlord", "The tenant"], "answer": "B"},
        {"prompt": "Who repairs?", "choices": ["The landlord", "The tenant"], "answer": 0},
        {"prompt": "Who moves?", "choices": ["The landlord", "The tenant"], "answer": "The tenant"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = read(tmp_path / "own.jsonl")
    assert [len(document.turns) for document in documents] == [0, 2, 2, 2, 2, 2]
    assert [document.question.answer for document in documents[3:]] == [1, 0, 1]
    assert documents[1].text == "Who pays?\n\nThe tenant."
    assert "B. The tenant" in documents[3].turns[1].content
    assert {(document.language, document.domain, document.task) for document in documents} == {("nl", "legal", "qa")}
    assert len({document.id for document in documents}) == len(rows)


def test_ids_stay_when_rows_are_added(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    before = [document.id for document in read(path)]
    path.write_text('{"text": "zero"}\n{"text": "one"}\n{"text": "two"}\n')
    assert [document.id for document in read(path)][1:] == before


def test_rows_of_a_long_table_have_a_place_each(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "long.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text number {n}" for n in range(2500)]}), path)
    places = [document.original for document in read_own(path, "own", Scenario("en", None, None))]
    assert len(set(places)) == 2500
    assert places[-1] == f"{path} row 2500"


def test_parquet_and_folders_are_read(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["first", "second"]}), tmp_path / "a.parquet")
    (tmp_path / "b.md").write_text("# Third\n\nparagraph")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert [document.text for document in read(tmp_path)] == ["first", "second", "# Third\n\nparagraph"]


def test_long_text_is_cut_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 100 for number in range(60)]
    (tmp_path / "own.txt").write_text("\n\n".join(paragraphs))
    documents = read(tmp_path / "own.txt")
    assert len(documents) > 5
    assert all(len(document.text) <= 4000 and document.text.startswith("Paragraph") for document in documents)


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"  \n\n", "is empty"),
        ("binary.txt", b"MZ\0\1\2\xff", "not UTF-8 text"),
        ("latin.txt", "Müller".encode("latin-1"), "not UTF-8 text"),
        ("image.png", b"\x89PNG", "files can be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl:2 is not JSON"),
        ("fields.jsonl", b'{"body": "a"}', '{"question", "answer"}'),
        ("list.jsonl", b"[1, 2]", "not list"),
        ("letter.jsonl", b'{"prompt": "q", "choices": ["x", "y"], "answer": "C"}', "index, the letter or the wording"),
        ("choice.jsonl", b'{"prompt": "q", "choices": ["x"], "answer": 0}', "at least two"),
        ("role.jsonl", b'{"messages": [{"role": "robot", "content": "x"}]}', '"role": "system" | "user"'),
        ("nothing.jsonl", b'{"text": "   "}', "holds no text"),
        ("table.parquet", b"PAR1 not really", "not a parquet file"),
    ],
)
def test_bad_files_are_refused_with_what_is_expected(tmp_path: Path, name: str, content: bytes, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        read(tmp_path / name)
    assert hint in str(caught.value)
    assert name in str(caught.value)


def test_missing_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no file"):
        read(tmp_path / "none.txt")
    with pytest.raises(InvalidRequest, match=r"holds no \.txt"):
        read(tmp_path)


def test_flags_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("text")
    assert parse_own_text(str(path)) == OwnText(path, 1.0)
    assert parse_own_text(f"{path}:2.5") == OwnText(path, 2.5)
    assert parse_dimension(f"style={path}") == ("style", path)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("{own}:heavy", "not a weight"),
        ("{own}:-1", "above 0"),
        ("{own}:0", "above 0"),
        ("{own}:nan", "above 0"),
        ("{folder}/none.txt", "there is no file"),
        ("{folder}/none.txt:2", "there is no file"),
    ],
)
def test_bad_corpus_flags_say_what_to_write(tmp_path: Path, value: str, hint: str) -> None:
    (tmp_path / "own.txt").write_text("text")
    with pytest.raises(InvalidRequest, match=hint):
        parse_own_text(value.format(own=tmp_path / "own.txt", folder=tmp_path))


@pytest.mark.parametrize(
    ("value", "hint"),
    [("style", "NAME=FILE"), ("=a.txt", "NAME=FILE"), ("domain=a.txt", "already"), ("style=none.txt", "no file")],
)
def test_bad_dimension_flags_say_what_to_write(value: str, hint: str) -> None:
    with pytest.raises(InvalidRequest, match=hint):
        parse_dimension(value)
