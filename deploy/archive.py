"""Bundles as one file, .tar.zst or .zip: the same files give the same bytes, whenever and wherever they are packed.

Only regular files in a fixed form are written, so the reader takes that form alone, byte for byte: no links, no
folders, no dates, no comments, nothing behind the end, and no two files of one name. A .zip stores its files as they
are, because quantized weights hardly shrink and compressors differ from machine to machine; it ends at 4 GiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from cusprun.deploy.manifest import MOST_FILES
from cusprun.deploy.members import MOST_BYTES, Member, Packed, shown
from cusprun.deploy.names import Names
from cusprun.deploy.stored_zip import read_zip, write_zip
from cusprun.deploy.tar_zst import read_tar, write_tar
from cusprun.errors import Failed, InvalidRequest

SUFFIXES = {"tar.zst": ".tar.zst", "zip": ".zip"}
LARGEST_RATIO = 100  # files over archive, beyond what is small
SMALL = 256 << 20


def archive_kind(path: Path) -> str | None:
    """The kind of archive that a file's name says; None where it says none."""
    return next((kind for kind, suffix in SUFFIXES.items() if path.name.lower().endswith(suffix)), None)


def write_archive(path: Path, kind: str, top: str, files: Iterable[Packed]) -> None:
    """Packs ``files`` below one folder named ``top``. Raises InvalidRequest where a .zip cannot hold them."""
    rows = [Packed(f"{top}/{file.name}", file.path, file.size, file.executable) for file in files]
    with path.open("xb") as sink:
        (write_tar if kind == "tar.zst" else write_zip)(sink, rows)


def read_archive(path: Path) -> Iterator[Member]:
    """The files of an archive, names without the folder around them.

    Raises InvalidRequest where the file's name is no archive's; Failed where it is not an archive that
    :func:`write_archive` wrote, with what is wrong.
    """
    kind = archive_kind(path)
    if kind is None:
        raise InvalidRequest(f"{path} is no bundle: name a folder, a {' or a '.join(SUFFIXES.values())}")
    return _checked(path, read_tar(path) if kind == "tar.zst" else read_zip(path))


def _checked(path: Path, members: Iterable[Member]) -> Iterator[Member]:
    """Members with names that may be, within limits."""
    names, total, top = Names(), 0, None
    most = min(MOST_BYTES, max(SMALL, LARGEST_RATIO * path.stat().st_size))
    for count, member in enumerate(members, 1):
        if count > MOST_FILES + 2:
            raise Failed(f"{path.name} has more than {MOST_FILES} files, the most that a bundle has")
        if (reason := names.take(member.name)) is not None:
            raise Failed(f"{path.name}: {shown(member.name)} {reason}")
        folder, slash, name = member.name.partition("/")
        if not slash or top not in (None, folder):
            raise Failed(f"{path.name}: {member.name} does not lie in the one folder that a bundle has")
        top, total = folder, total + member.size
        if total > most:
            raise Failed(f"{path.name} would unpack to more than {most >> 20} MiB: it is no bundle of this size")
        yield Member(name, member.size, member.executable, member.pieces)
    if top is None:
        raise Failed(f"{path.name} is empty")
