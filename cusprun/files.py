"""Writing so that an output appears whole or not at all, and hashing what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cusprun.errors import Failed

PIECE = 2**20  # bytes that are copied at once


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """Hex sha256 over the sorted relative paths of a folder and each file's sha256."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def aside(path: Path) -> Path:
    """A name beside ``path`` (same file system) to write to before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary file path; it becomes ``path`` when the block ends well, and disappears otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = aside(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary folder; it becomes ``path`` (replacing what was there) when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = aside(path)
    part.mkdir()
    try:
        yield part
        if path.exists():
            old = aside(path)
            os.rename(path, old)
            os.rename(part, path)
            shutil.rmtree(old)
        else:
            os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_folder(source: Path, path: Path) -> None:
    """A copy of a folder, whole or not at all."""
    with folder_written_whole(path) as part:
        shutil.copytree(source, part, dirs_exist_ok=True)


def copy_range(source: BinaryIO, begin: int, length: int, out: BinaryIO) -> None:
    """Copies ``length`` bytes of ``source`` from ``begin`` on. Raises Failed where it ends before."""
    source.seek(begin)
    while length:
        piece = source.read(min(length, PIECE))
        if not piece:
            raise Failed(f"{source.name} is shorter than its header says: export it again")
        out.write(piece)
        length -= len(piece)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with a final newline, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
