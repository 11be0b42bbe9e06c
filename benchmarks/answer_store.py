"""Answers that were measured once, by content hash, so that an interrupted run goes on and a repeated one is free.

One SQLite file in the cache holds JSON by key. An answer is in it as soon as it is there, whatever ends the run.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from cusprun.corpora.cache import cache_folder, make_folder
from cusprun.errors import Failed, reason_of
from cusprun.files import sha256_file, sha256_tree

VERSION = 1  # of what an answer means; raised where the same request is answered in another way
PACKAGES = {"gguf": ("llama-cpp-python",), "onnx": ("onnxruntime", "tokenizers"), "folder": ("torch", "transformers")}
NAME = "answers.sqlite"
WAIT = 60  # seconds for another process that writes


def store_path() -> Path:
    """The file that holds the answers; its folder is made. Raises Failed where that cannot be."""
    return make_folder(cache_folder() / "answers") / NAME


def has_store() -> bool:
    """Whether anything was ever kept."""
    return (cache_folder() / "answers" / NAME).is_file()


def artifact_sha256(path: Path) -> str:
    """Hex sha256 of a .gguf file (of a split one all its parts), an ONNX folder or a model folder."""
    from cusprun.runtimes.gguf_header import load_metadata

    if path.is_dir():
        return sha256_tree(path)
    parts = load_metadata(path).parts
    if len(parts) == 1:
        return sha256_file(path)
    return hashlib.sha256("".join(map(sha256_file, parts)).encode()).hexdigest()


def answer_keys(artifact: Path, requests: Sequence[dict[str, Any]], device: str) -> list[str]:
    """A hex sha256 for every request: the artifact's bytes, what runs it, the device, the request itself."""
    from cusprun.runtimes import is_onnx

    kind = "gguf" if artifact.is_file() else "onnx" if is_onnx(artifact) else "folder"
    versions = [f"{name} {version(name)}" for name in PACKAGES[kind]]
    start = json.dumps([VERSION, artifact_sha256(artifact), versions, device])
    return [hashlib.sha256((start + json.dumps(request, sort_keys=True)).encode()).hexdigest() for request in requests]


class AnswerStore:
    """An open store; several processes may have it open. Raises Failed where the file is none or the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._database = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, key: str) -> Any:
        """The answer of a key, None where there is none; no answer is null."""
        try:
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> None:
        """Keeps an answer, at once and for good."""
        try:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def forget(self, keys: Sequence[str]) -> None:
        """Removes the answers of these keys."""
        try:
            self._database.execute("BEGIN")
            self._database.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> Failed:
        if isinstance(error, sqlite3.OperationalError):  # full, locked, read-only: the answers themselves are sound
            return Failed(f"the answers kept in {self._path} cannot be reached: {reason_of(error)}")
        return Failed(f"the answers kept in {self._path} are damaged ({reason_of(error)}): delete the file")
