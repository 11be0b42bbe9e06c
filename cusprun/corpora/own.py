"""The user's own text: txt, md, jsonl and parquet files, or folders of them, read into documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cusprun.corpora.document import Document, OwnText, Question, Scenario
from cusprun.corpora.text import clean, split_text
from cusprun.errors import InvalidRequest, MissingPackage
from cusprun.runtimes import Message

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ROWS = '{"text"}, {"question", "answer"}, {"messages": [{"role", "content"}, ...]} or {"prompt", "choices", "answer"}'
PIECE = 4000  # characters of one document of running text: short, so that one small file can have both sides
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_own_text(value: str) -> OwnText:
    """``FILE`` or ``FILE:weight`` as --corpus takes it. Raises InvalidRequest for a bad weight or a missing file."""
    path, weight = Path(value).expanduser(), 1.0
    if not path.exists() and ":" in value:
        head, _, tail = value.rpartition(":")
        try:
            weight = float(tail)
        except ValueError:
            if Path(head).expanduser().exists():
                raise InvalidRequest(f"--corpus {value}: {tail!r} is not a weight; write {head}:2.0") from None
        else:
            path = Path(head).expanduser()
    if not path.exists():
        raise InvalidRequest(f"--corpus {value}: there is no file {path}; write FILE or FILE:weight")
    if not 0 < weight <= 1000:
        raise InvalidRequest(f"--corpus {value}: the weight has to lie above 0 and at most at 1000, not {weight:g}")
    return OwnText(path, weight)


def parse_dimension(value: str) -> tuple[str, Path]:
    """``NAME=FILE`` as --dim takes it. Raises InvalidRequest where it is not that or the file is missing."""
    name, equals, file = value.partition("=")
    name = name.strip()
    if not equals or not name.replace("-", "").replace("_", "").isalnum() or not file:
        raise InvalidRequest(f"--dim {value}: write NAME=FILE, such as style=letters.jsonl")
    if name in ("language", "domain", "task", "general", "scenario"):
        raise InvalidRequest(f"--dim {value}: {name} is a dimension already; choose another name")
    path = Path(file).expanduser()
    if not path.exists():
        raise InvalidRequest(f"--dim {value}: there is no file {path}")
    return name, path


def read_own(path: Path, entry: str, scenario: Scenario) -> list[Document]:
    """The documents of a file or of every txt, md, jsonl and parquet file in a folder, in order.

    The original of each is where it stood, a file or a row. ``entry`` is the name they go by. Ids are made of the
    content, so that they stay when rows are added. Raises InvalidRequest where the path is missing, empty, binary,
    unreadable or in another form, saying what is expected.
    """
    if not path.exists():
        raise InvalidRequest(f"there is no file {path}")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise InvalidRequest(f"{path} holds no {', '.join(SUFFIXES)} file")
    elif path.suffix.lower() in SUFFIXES:
        files = [path]
    else:
        raise InvalidRequest(f"{path}: {', '.join(SUFFIXES)} files can be read, not {path.suffix or 'this'}")
    documents: dict[str, Document] = {}
    for file in files:
        for document in _read_file(file, entry, scenario):
            documents.setdefault(document.id, document)
    if not documents:
        raise InvalidRequest(f"{path} holds no text")
    return list(documents.values())


def _read_file(path: Path, entry: str, scenario: Scenario) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _parquet_rows(path)
    elif suffix == ".jsonl":
        rows = jsonl_rows(path)
    else:
        rows = iter([(str(path), {"text": _read_text(path)})])
    for where, row in rows:
        for text, turns, question in read_row(row, where):
            key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            tags = (scenario.language, scenario.domain, scenario.task)
            yield Document(f"{entry}/{key}", text, entry, *tags, turns, question, where)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    if not data.strip():
        raise InvalidRequest(f"{path} is empty")
    try:
        if b"\0" in data:
            raise ValueError("zero bytes")
        return data.decode("utf-8-sig")
    except ValueError as error:
        raise InvalidRequest(f"{path} is not UTF-8 text ({error}); {', '.join(SUFFIXES)} can be read") from error


def jsonl_rows(path: Path, form: str = f"each line is one of {ROWS}") -> Iterator[tuple[str, Any]]:
    """Where each line of a file stands, and its value. Raises InvalidRequest, telling ``form``, where it is no JSON."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InvalidRequest(f"{path}:{number} is not JSON ({error}); {form}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", "eval", f"reading {path.name}") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{path} is not a parquet file that can be read ({error})") from error


def read_row(row: Any, where: str) -> list[tuple[str, tuple[Message, ...], Question | None]]:
    """(text, turns, question) of one row; running text longer than a document is cut into several.

    Raises InvalidRequest, naming ``where``, for a row of another form.
    """
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{where}: a row is {ROWS}, not {type(row).__name__}")
    if isinstance(row.get("messages"), Sequence) and not isinstance(row["messages"], str):
        turns = tuple(_message(turn, where) for turn in row["messages"])
        if any(turn.content.strip() for turn in turns):
            return [(join_turns(turns), turns, None)]
    elif {"prompt", "choices", "answer"} <= row.keys():
        return [_choice_row(row, where)]
    elif {"question", "answer"} <= row.keys():
        asked, answered = clean(str(row["question"])), clean(str(row["answer"]))
        if asked and answered:
            turns = (Message("user", asked), Message("assistant", answered))
            return [(join_turns(turns), turns, None)]
    elif isinstance(row.get("text"), str):
        return [(piece, (), None) for piece in split_text(clean(row["text"]), PIECE)]
    else:
        raise InvalidRequest(f"{where}: a row is {ROWS}, not {{{', '.join(map(repr, row))}}}")
    return []


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "user", "assistant"):
        raise InvalidRequest(f'{where}: a message is {{"role": "system" | "user" | "assistant", "content": text}}')
    return Message(turn["role"], clean(str(turn.get("content", ""))))


def _choice_row(row: Mapping[str, Any], where: str) -> tuple[str, tuple[Message, ...], Question]:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise InvalidRequest(f"{where}: choices has to be a list of at least two answers")
    wordings = tuple(clean(str(choice)) for choice in choices)
    if isinstance(answer, str) and answer in wordings:
        answer = wordings.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in LETTERS:
        answer = LETTERS.index(answer.upper())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(wordings):
        raise InvalidRequest(f"{where}: answer has to be the index, the letter or the wording of one of the choices")
    question = Question(clean(str(row["prompt"])), wordings, answer)
    turns = question_turns(question)
    return join_turns(turns), turns, question


def question_turns(question: Question) -> tuple[Message, ...]:
    """The user's turn (prompt and lettered choices) and the assistant's (letter and wording of the right one)."""
    lines = [f"{LETTERS[index]}. {choice}" for index, choice in enumerate(question.choices)]
    asked = "\n".join([question.prompt, *lines])
    return Message("user", asked), Message("assistant", lines[question.answer])


def join_turns(turns: Sequence[Message]) -> str:
    """The turns' contents joined by blank lines: what a model without a chat template sees."""
    return "\n\n".join(turn.content for turn in turns if turn.content)
