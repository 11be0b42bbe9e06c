"""Reads members out of wheels, npm tarballs and Debian packages in memory; nothing is extracted, imported or run.

Names that leave the archive, links and bombs are refused before any parser sees a byte.
"""

from __future__ import annotations

import fnmatch
import gzip
import importlib
import importlib.util
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cusprun.errors import Failed

MEMBER_LIMIT = 160 * 2**20  # bytes of one member that a parser asks for
TOTAL_LIMIT = 1536 * 2**20  # bytes that one archive may unpack to while it is read
COUNT_LIMIT = 200_000  # members of one archive


def read_members(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of the members whose name matches one of the shell ``patterns``, in archive order.

    ``path`` is a .whl or .zip, a .tgz or .tar.gz, or a .deb. Raises Failed where it is damaged, where any member's
    name is absolute or climbs out of the archive, where a wanted member is a link, or where a limit is passed.
    """
    name = path.name.lower()
    try:
        if name.endswith((".whl", ".zip")):
            yield from _read_zip(path, patterns)
        elif name.endswith((".tgz", ".tar.gz")):
            with path.open("rb") as file, gzip.open(file) as stream:
                yield from _read_tar(path, stream, patterns)
        elif name.endswith(".deb"):
            yield from _read_deb(path, patterns)
        else:
            raise Failed(f"{path.name}: not a kind of archive that can be read (.whl, .zip, .tgz, .tar.gz, .deb)")
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise Failed(f"{path} is damaged ({error}); delete it and pull the entry again") from error


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _checked(archive: Path, name: str) -> str:
    """The member's name without a leading ``./``; refuses names that could point outside."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or (parts and ":" in parts[0]):
        raise Failed(f"{archive.name} holds a member named {name!r} that points outside the archive; it is not read")
    return "/".join(part for part in parts if part != ".")


def _too_large(archive: Path, what: str, limit: int) -> Failed:
    return Failed(f"{archive.name}: {what} unpacks to more than {limit // 2**20} MiB; it is not read")


def _read_zip(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if len(infos) > COUNT_LIMIT:
            raise Failed(f"{path.name} holds more than {COUNT_LIMIT} members; it is not read")
        total = 0
        names = [_checked(path, info.filename) for info in infos]
        for name, info in zip(names, infos, strict=True):
            if info.is_dir() or not _wanted(name, patterns):
                continue
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise Failed(f"{path.name}: {name} is a link; links are not followed")
            if info.file_size > MEMBER_LIMIT:
                raise _too_large(path, name, MEMBER_LIMIT)
            with archive.open(info) as member:
                data = member.read(MEMBER_LIMIT + 1)
            total += len(data)
            if len(data) > MEMBER_LIMIT:
                raise _too_large(path, name, MEMBER_LIMIT)
            if total > TOTAL_LIMIT:
                raise _too_large(path, "it", TOTAL_LIMIT)
            yield name, data


class _Bounded(io.RawIOBase):
    """A byte stream that refuses to yield more than TOTAL_LIMIT bytes."""

    def __init__(self, archive: Path, stream: IO[bytes]) -> None:
        self._archive = archive
        self._stream = stream
        self._left = TOTAL_LIMIT

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(self._left + 1 if size < 0 else size)
        self._left -= len(data)
        if self._left < 0:
            raise _too_large(self._archive, "it", TOTAL_LIMIT)
        return data


def _read_tar(path: Path, stream: Any, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    bounded: Any = _Bounded(path, stream)
    with tarfile.open(fileobj=bounded, mode="r|") as archive:
        for count, info in enumerate(archive):
            if count >= COUNT_LIMIT:
                raise Failed(f"{path.name} holds more than {COUNT_LIMIT} members; it is not read")
            name = _checked(path, info.name)
            if info.isdir() or not _wanted(name, patterns):
                continue
            if not info.isreg():
                raise Failed(f"{path.name}: {name} is a link or a device; links are not followed")
            if info.size > MEMBER_LIMIT:
                raise _too_large(path, name, MEMBER_LIMIT)
            member = archive.extractfile(info)
            if member is None:
                raise Failed(f"{path.name}: {name} cannot be read")
            yield name, member.read(MEMBER_LIMIT + 1)


def _read_deb(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """A .deb is an ar archive of debian-binary, control.tar.* and data.tar.*; the text is in the last."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise Failed(f"{path} is not a Debian package; delete it and pull the entry again")
        while header := file.read(60):
            if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
                raise Failed(f"{path} is damaged (bad ar header); delete it and pull the entry again")
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                if size > MEMBER_LIMIT:
                    raise _too_large(path, name, MEMBER_LIMIT)
                packed = io.BytesIO(file.read(size))
                yield from _read_tar(path, _decompressed(path, name, packed), patterns)
                return
            file.seek(size + size % 2, io.SEEK_CUR)
    raise Failed(f"{path} holds no data.tar; delete it and pull the entry again")


def _decompressed(path: Path, name: str, file: IO[bytes]) -> Any:
    """A stream of the data tarball's bytes."""
    if name.endswith(".xz"):
        return lzma.open(file)
    if name.endswith(".gz"):
        return gzip.open(file)
    if name.endswith(".zst"):
        for module in ("compression.zstd", "zstandard"):
            if importlib.util.find_spec(module.split(".")[0]):
                return importlib.import_module(module).open(file)
        raise Failed(f"{path.name} is packed with zstd: pip install zstandard (Python 3.14 has it built in)")
    if name == "data.tar":
        return file
    raise Failed(f"{path.name}: {name} is packed in a way that cannot be read (xz, gz and zst can)")
