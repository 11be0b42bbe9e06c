"""Holds a bundle, a folder or an archive, against its manifest and its signature; unpacks archives that hold.

Every file that was changed, removed, added, renamed, truncated or swapped is named. Without a key that proves the
absence of accidents alone: whoever changes a bundle on purpose can write its manifest anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cusprun.deploy.archive import archive_kind, read_archive
from cusprun.deploy.manifest import LONGEST_MANIFEST, MANIFEST, MOST_FILES, SIGNATURE, Entry, Manifest, read_manifest
from cusprun.deploy.members import Member, shown
from cusprun.deploy.signing import LONGEST_SIGNATURE, check_form, check_signature
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import folder_written_whole

KEPT = {MANIFEST: LONGEST_MANIFEST, SIGNATURE: LONGEST_SIGNATURE}  # files whose content is read, with the most bytes
MOST_TOLD = 20  # problems
DEEPEST = 120  # folders within folders


@dataclass(frozen=True)
class Verified:
    """A bundle that is what its manifest says."""

    name: str
    target: str
    digest: str  # the manifest's; the same for every bundle of the same files
    files: int
    bytes: int
    signer: str | None  # fingerprint of the key that the manifest names
    signature: str  # "verified", "unverified" without a key, "none"

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge verify --json` prints."""
        return asdict(self)

    def as_lines(self) -> list[str]:
        """What `cusprun-edge verify` prints."""
        lines = [f"{self.name} for {self.target}: {self.files} files, {self.bytes} bytes, digest {self.digest}"]
        if self.signature == "verified":
            return [*lines, f"signed by the key {self.signer}: nothing was changed since"]
        if self.signature == "unverified":
            lines.append(f"a signature by the key {self.signer} is there and was not checked: give --key PUBLIC_KEY")
        else:
            lines.append("it has no signature")
        return [*lines, "every file is what the manifest says, which rules out accidents and no intent"]


@dataclass(frozen=True)
class _Found:
    """A file as it was read."""

    bytes: int
    sha256: str
    executable: bool | None  # None where the file system may not keep it


def verify(bundle: Path, key: Path | None = None) -> Verified:
    """Reads the bundle once. Raises Failed with everything that is wrong; InvalidRequest where it is none."""
    if bundle.is_dir():
        return _judge(*_read_folder(bundle), key)
    if not bundle.is_file():
        raise InvalidRequest(f"{bundle}: there is no such bundle")
    kept: dict[str, bytes] = {}
    found = {member.name: _take(member, kept, None) for member in read_archive(bundle)}
    return _judge(found, kept, [], key)


def unpack(bundle: Path, out: Path, key: Path | None = None) -> Verified:
    """Unpacks an archive to the folder ``out``, which appears only once everything in it was found right.

    Raises as :func:`verify` does, and InvalidRequest where ``out`` exists or the disk is too small.
    """
    if bundle.is_dir() or archive_kind(bundle) is None:
        raise InvalidRequest(f"{bundle} is no archive: name a .tar.zst or a .zip")
    if not bundle.is_file():
        raise InvalidRequest(f"{bundle}: there is no such bundle")
    if out.exists() or out.is_symlink():
        raise InvalidRequest(f"--out {out} exists; choose another name or remove it")
    with folder_written_whole(out) as part:
        room = shutil.disk_usage(part).free
        kept: dict[str, bytes] = {}
        found: dict[str, _Found] = {}
        for member in read_archive(bundle):
            room -= member.size
            if room < 0:
                raise Failed(f"{bundle.name} holds more than is free on the disk of {out}: make room")
            found[member.name] = _take(member, kept, part / member.name)
        return _judge(found, kept, [], key)


def _take(member: Member, kept: dict[str, bytes], path: Path | None) -> _Found:
    """Reads a member of an archive, into ``path`` where that is given."""
    digest, content = hashlib.sha256(), bytearray()
    keep = _keeps(member.name, member.size)
    if path is None:
        for piece in member.pieces:
            digest.update(piece)
            content += piece if keep else b""
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in member.pieces:
                digest.update(piece)
                content += piece if keep else b""
                file.write(piece)
        path.chmod(0o755 if member.executable else 0o644)
    if keep:
        kept[member.name] = bytes(content)
    return _Found(member.size, digest.hexdigest(), member.executable)


def _keeps(name: str, size: int) -> bool:
    if name in KEPT and size > KEPT[name]:
        raise Failed(f"{name} has {size} bytes, and {KEPT[name]} at most make sense")
    return name in KEPT


def _read_folder(folder: Path) -> tuple[dict[str, _Found], dict[str, bytes], list[str]]:
    """The files of a folder, what the manifest and the signature hold, and what no bundle has."""
    if not (folder / MANIFEST).is_file():
        raise Failed(f"{folder} has no {MANIFEST}: it is no bundle, or it was taken out")
    found: dict[str, _Found] = {}
    kept: dict[str, bytes] = {}
    problems: list[str] = []
    for name, status in _walk(folder, ""):
        path = folder / name
        if stat.S_ISDIR(status.st_mode):
            problems.append(f"{name + '/'!r} is an empty folder, which the manifest does not list")
        elif not stat.S_ISREG(status.st_mode):
            problems.append(f"{name!r} is {'a link' if stat.S_ISLNK(status.st_mode) else 'no file'}")
        else:
            if len(found) > MOST_FILES + 2:
                raise Failed(f"{folder} has more than {MOST_FILES} files, the most that a bundle has")
            if _keeps(name, status.st_size):
                kept[name] = path.read_bytes()
            with path.open("rb") as file:
                found[name] = _Found(status.st_size, hashlib.file_digest(file, "sha256").hexdigest(), None)
    return found, kept, problems


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder that is no folder with something in it; links are not followed."""
    if prefix.count("/") > DEEPEST:
        raise Failed(f"{shown(prefix)} lies deeper than any file of a bundle")
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        name, status = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            yield name, status
            continue
        inside = False
        for row in _walk(Path(entry.path), f"{name}/"):
            inside = True
            yield row
        if not inside:
            yield name, status


def _judge(found: dict[str, _Found], kept: dict[str, bytes], problems: list[str], key: Path | None) -> Verified:
    """What was read held against the manifest, and both against the signature."""
    if MANIFEST not in kept:
        raise Failed(f"there is no {MANIFEST}: it is no bundle, or it was taken out")
    manifest = read_manifest(kept[MANIFEST])
    problems = [*problems, *_differences(manifest, found)]
    if problems:
        more = len(problems) - MOST_TOLD
        told = problems if more <= 0 else [*problems[:MOST_TOLD], f"and {more} more"]
        raise Failed("the bundle is not what was shipped:\n" + "\n".join(f"- {line}" for line in told))
    signature = "none" if manifest.signer is None else "unverified"
    if SIGNATURE in kept:
        check_form(kept[SIGNATURE])
    if key is not None:
        if manifest.signer is None:
            raise Failed(f"the bundle is not signed, and --key {key} asks for a signature")
        hashes = {name: file.sha256 for name, file in found.items() if name != SIGNATURE}
        if check_signature(kept[SIGNATURE], hashes, key) != manifest.signer:
            raise Failed(f"the bundle is signed by {key}, and its manifest names another key, {manifest.signer}")
        signature = "verified"
    size = sum(entry.bytes for entry in manifest.files)
    return Verified(
        manifest.name, manifest.target, manifest.digest, len(manifest.files), size, manifest.signer, signature
    )


def _differences(manifest: Manifest, found: dict[str, _Found]) -> Iterator[str]:
    """One line for every file that is not as the manifest says."""
    listed = {entry.path: entry for entry in manifest.files}
    holders = {entry.sha256: entry.path for entry in reversed(manifest.files)}
    own = {MANIFEST, *([SIGNATURE] if manifest.signer else [])}
    if manifest.signer and SIGNATURE not in found:
        yield f"{SIGNATURE} is missing, and the bundle was signed"
    added = {name for name in found if name not in listed and name not in own}
    for name, entry in listed.items():
        if name in found:
            yield from _difference(entry, found[name], holders)
            continue
        names = sorted(other for other in added if found[other].sha256 == entry.sha256)
        if names:
            added.discard(names[0])
            yield f"{name} is called {names[0]!r}"
        else:
            yield f"{name} is missing"
    for name in sorted(own & found.keys()):
        if found[name].executable:
            yield f"{name} is marked as a program"
    for name in sorted(added):
        yield f"{name!r} was added: the manifest does not list it"


def _difference(entry: Entry, found: _Found, holders: dict[str, str]) -> Iterable[str]:
    if found.sha256 != entry.sha256:
        if found.sha256 in holders:
            yield f"{entry.path} holds what belongs in {holders[found.sha256]}"
        elif found.bytes != entry.bytes:
            yield f"{entry.path} has {found.bytes} bytes instead of {entry.bytes}"
        else:
            yield f"{entry.path} was changed: its sha256 is {found.sha256}"
    elif found.executable is not None and found.executable != entry.executable:
        yield f"{entry.path} is {'' if found.executable else 'not '}marked as a program"
