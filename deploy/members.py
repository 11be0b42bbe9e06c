"""What the two kinds of archive have in common: a file to pack, a file that is read, and how both are spoken of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cusprun.errors import Failed

PIECE = 1 << 20
MOST_BYTES = 256 << 30  # of all files together


@dataclass(frozen=True)
class Packed:
    """One file to pack."""

    name: str
    path: Path
    size: int  # bytes
    executable: bool


@dataclass(frozen=True)
class Member:
    """One file of an archive that is read; ``pieces`` has to be used up before the next member."""

    name: str
    size: int  # bytes
    executable: bool
    pieces: Iterator[bytes]


def exactly(file: Packed) -> Iterator[bytes]:
    """A file's bytes. Raises Failed where there are more or fewer than was said."""
    left = file.size
    with file.path.open("rb") as source:
        while piece := source.read(PIECE):
            left -= len(piece)
            if left < 0:
                break
            yield piece
    if left:
        raise Failed(f"{file.path} changed while it was packed: give the same command again")


def shown(name: object) -> str:
    """A name from outside for a message: no control characters, of bounded length."""
    return ascii(name)[:120]


def damaged(path: Path, what: str) -> NoReturn:
    """Raises Failed: the archive is not as it was written."""
    raise Failed(f"{path.name} is damaged: {what}")
