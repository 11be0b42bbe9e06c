"""The files of a bundle by name, gathered before anything is written, so that its bytes depend on nothing else."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cusprun.corpora.cache import cache_folder, make_folder
from cusprun.files import sha256_file


@dataclass(frozen=True)
class Source:
    """Where a file's bytes come from: a path on this disk, or the bytes themselves."""

    content: Path | bytes
    executable: bool = False

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def sha256(self) -> str:
        """Hex sha256 of the bytes, which are not held in memory."""
        return (
            hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else sha256_file(self.content)
        )


class Files:
    """Relative names with forward slashes, each once, whatever the case."""

    def __init__(self) -> None:
        self._sources: dict[str, Source] = {}

    def add(self, name: str, content: Path | bytes | str, *, executable: bool = False) -> None:
        """Adds a file; text becomes UTF-8. Raises ValueError on a name that is taken, absolute or has `..`."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or not pure.parts:
            raise ValueError(f"no name for a file of a bundle: {name}")
        if name.casefold() in {there.casefold() for there in self._sources}:
            raise ValueError(f"the bundle holds {name} already")
        self._sources[name] = Source(content.encode() if isinstance(content, str) else content, executable)

    def add_tree(self, name: str, folder: Path) -> None:
        """Adds every file under ``folder`` as ``name``/..."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.add(f"{name}/{path.relative_to(folder).as_posix()}", path)

    def scratch(self) -> Path:
        """A new folder for what is made on the way; it lives as long as these files are gathered."""
        folder = tempfile.TemporaryDirectory(dir=make_folder(cache_folder()), prefix="parts-")
        weakref.finalize(self, folder.cleanup)
        return Path(folder.name)

    def __iter__(self) -> Iterator[tuple[str, Source]]:
        yield from sorted(self._sources.items())

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def __len__(self) -> int:
        return len(self._sources)
