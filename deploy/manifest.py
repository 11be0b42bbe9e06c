"""manifest.json: every file of a bundle with its size and sha256, and a digest over the manifest itself.

The digest is the bundle's fingerprint: it is the same whenever the same expert is shipped to the same target.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from cusprun.deploy.members import shown
from cusprun.deploy.names import Names, why_refused
from cusprun.errors import Failed

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
SCHEMA_VERSION = 1
MOST_FILES = 10_000
LONGEST_MANIFEST = 8 << 20  # bytes
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One file of a bundle; ``path`` has forward slashes."""

    path: str
    bytes: int
    sha256: str
    executable: bool


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds beside the manifest and the signature."""

    name: str
    target: str
    signer: str | None  # sha256 of the public key in PEM, where the bundle is signed
    files: tuple[Entry, ...]  # by path

    @property
    def digest(self) -> str:
        """Hex sha256 over everything else here."""
        text = json.dumps(self._document(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file; the same manifest always gives the same bytes."""
        document = {**self._document(), "digest": self.digest}
        return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()

    def _document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def read_manifest(content: bytes) -> Manifest:
    """Reads what :meth:`Manifest.to_bytes` wrote. Raises Failed for anything else, be it one byte."""
    try:
        document = json.loads(content)
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise Failed(f"{MANIFEST} is of schema version {version!r}; this cusprun reads {SCHEMA_VERSION}: update it")
        files = tuple(Entry(**row) for row in document["files"])
        found = Manifest(document["name"], document["target"], document["signer"], files)
        same = found.to_bytes() == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failed(f"{MANIFEST} is damaged: it is not what `cusprun-edge ship` writes") from error
    if not same:
        raise Failed(f"{MANIFEST} is damaged: its digest is not that of its content")
    _check(found)
    return found


def _check(manifest: Manifest) -> None:
    """Raises Failed where the digest is right and the content cannot be all the same."""
    _check_words(manifest)
    names = Names()
    for reserved in (MANIFEST, SIGNATURE):
        names.take(reserved)
    if len(manifest.files) > MOST_FILES:
        raise Failed(f"{MANIFEST} lists {len(manifest.files)} files, and a bundle has {MOST_FILES} at most")
    for entry in manifest.files:
        if not isinstance(entry.path, str) or (reason := names.take(entry.path)) is not None:
            raise Failed(f"{MANIFEST}: {entry.path!r} {reason if isinstance(entry.path, str) else 'is no path'}")
        sized = type(entry.bytes) is int and entry.bytes >= 0 and type(entry.executable) is bool
        if not sized or not isinstance(entry.sha256, str) or not SHA256.fullmatch(entry.sha256):
            raise Failed(f"{MANIFEST}: {entry.path} has no size and sha256 that can be")
    if [entry.path for entry in manifest.files] != sorted(entry.path for entry in manifest.files):
        raise Failed(f"{MANIFEST} is damaged: its files are not in order")


def _check_words(manifest: Manifest) -> None:
    """Raises Failed where what is printed of a bundle is not what an expert, a target or a key can be called."""
    from cusprun.deploy.targets import NAMES

    name, signer = manifest.name, manifest.signer
    if not isinstance(name, str) or "/" in name or why_refused(name) is not None:
        raise Failed(f"{MANIFEST}: the name {shown(name)} is none that an expert has")
    if manifest.target not in NAMES:
        raise Failed(f"{MANIFEST}: the target {shown(manifest.target)} is none of {', '.join(NAMES)}")
    if signer is not None and not (isinstance(signer, str) and SHA256.fullmatch(signer)):
        raise Failed(f"{MANIFEST}: the signer {shown(signer)} is no sha256 of a key")
