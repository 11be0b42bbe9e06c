"""An expert's folder in, a bundle for one kind of device out: a folder, an archive of it, or both.

The target's own files are gathered first; README, model card, licences, bill of materials, manifest and signature come
around them. Nothing in a bundle tells when, where or by whom it was made, so that the same expert gives the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.deploy.archive import SUFFIXES, archive_kind, write_archive
from cusprun.deploy.bom import BOM, write_bom
from cusprun.deploy.expert import Artifact, Expert, read_expert
from cusprun.deploy.figures import read_figures
from cusprun.deploy.files import Files, Source
from cusprun.deploy.manifest import MANIFEST, MOST_FILES, SIGNATURE, Entry, Manifest
from cusprun.deploy.members import Packed
from cusprun.deploy.model_card import CARD, add_licences, write_card
from cusprun.deploy.names import Names, why_refused
from cusprun.deploy.provenance import Provenance, trace
from cusprun.deploy.signing import Signer
from cusprun.deploy.targets import NAMES, PER_LAYER, Notes, Wish, find_target
from cusprun.errors import InvalidRequest
from cusprun.files import aside, folder_written_whole, sha256_file, sha256_tree
from cusprun.progress import say

README = "README.md"
PLAIN = re.compile(r"\w[\w.+-]*")  # names that no shell reads as anything else
# What opens it without being told how: only a server's receiver is sure to have zstd.
ARCHIVES = {"laptop": "zip", "phone": "zip", "browser": "zip", "server": "tar.zst"}


@dataclass(frozen=True)
class Bundle:
    """What was written."""

    name: str
    target: str
    folder: Path | None
    archive: Path | None
    archive_sha256: str | None
    digest: str  # the manifest's: the same for the same files
    files: int
    bytes: int
    signer: str | None  # fingerprint of the key
    notes: Notes

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge ship --json` prints."""
        places = {"folder": self.folder, "archive": self.archive}
        return {
            "name": self.name,
            "target": self.target,
            **{key: None if path is None else str(path) for key, path in places.items()},
            "archive_sha256": self.archive_sha256,
            "digest": self.digest,
            "files": self.files,
            "bytes": self.bytes,
            "signer": self.signer,
            "needs": list(self.notes.needs),
            "unproven": list(self.notes.unproven),
        }

    def as_lines(self) -> list[str]:
        """What `cusprun-edge ship` prints."""
        lines = [f"{path}" for path in (self.folder, self.archive) if path is not None]
        if self.archive is not None:
            lines[-1] += f"  sha256 {self.archive_sha256}"
        lines.append(f"{self.files} files, {self.bytes / 2**20:.1f} MiB, digest {self.digest}")
        return [*lines, *(f"needs: {line}" for line in self.notes.needs)]


def ship(
    folder: Path,
    target: str,
    out: Path | None = None,
    *,
    archive: str | None = None,
    wish: Wish | None = None,
    layout: str | None = None,
    sign_key: Path | None = None,
    passphrase: str | None = None,
) -> Bundle:
    """Ships the expert in ``folder``.

    ``out`` is the bundle's folder (default bundles/NAME-TARGET) with the archive beside it, or the archive alone where
    it ends with .tar.zst or .zip. ``archive`` is tar.zst, zip or none; by default what the target's receiver opens.
    ``layout`` "uniform" ships a GGUF whose layers have one width. Raises InvalidRequest before anything is written
    where something makes no sense, is in the way, or the expert is not as its build left it.
    """
    if target not in NAMES:
        raise InvalidRequest(f"--target {target}: write one of {', '.join(NAMES)}")
    if archive not in (None, "none", *SUFFIXES):
        raise InvalidRequest(f"--archive {archive}: write one of {', '.join(SUFFIXES)}, none")
    if layout not in (None, "uniform"):
        raise InvalidRequest(f"--layout {layout}: uniform, or leave it out for the layout of the build")
    signer = Signer(sign_key, passphrase) if sign_key is not None else None
    expert = read_expert(folder)
    for name in (expert.name, *(one.path.name for one in expert.artifacts)):
        if not PLAIN.fullmatch(name) or why_refused(name) is not None:
            raise InvalidRequest(f"{name!r} cannot be named in scripts on every system: build the expert with --name")
    places = _Places.choose(expert, target, out, archive)
    _check_artifacts(expert)
    wish = wish or Wish()
    with tempfile.TemporaryDirectory(prefix="cusprun-ship-") as scratch:
        if layout == "uniform":
            from cusprun.deploy.uniform import with_uniform

            expert = with_uniform(expert, wish, Path(scratch))
        files = Files()
        notes = find_target(target)(expert, files, wish)
        if layout is None and _is_per_layer(expert, files):
            say("its layers differ in width, which Ollama is not known to open: --layout uniform makes them alike")
        _complete(expert, target, files, notes, signer)
        return _write(expert, target, files, notes, signer, places)


@dataclass(frozen=True)
class _Places:
    """Where the bundle goes; one of the two at least."""

    folder: Path | None
    archive: Path | None

    @classmethod
    def choose(cls, expert: Expert, target: str, out: Path | None, archive: str | None) -> _Places:
        out = out or Path("bundles") / _top(expert, target)
        named = archive_kind(out)
        if named is not None:
            if archive not in (None, named):
                raise InvalidRequest(f"--out {out} and --archive {archive} are two kinds of archive: give one")
            places = cls(None, out)
        else:
            kind = archive or ARCHIVES[target]
            places = cls(out, None if kind == "none" else out.with_name(out.name + SUFFIXES[kind]))
        for path in (places.folder, places.archive):
            if path is not None and (path.exists() or path.is_symlink()):
                raise InvalidRequest(f"--out {out}: {path} exists; choose another name or remove it")
        return places


def _check_artifacts(expert: Expert) -> None:
    """Raises InvalidRequest where an artifact is not the one that the build proved."""
    for one in expert.artifacts:
        digest = sha256_tree(one.path) if one.path.is_dir() else sha256_file(one.path)
        if digest != one.sha256:
            raise InvalidRequest(
                f"{one.path} is not what expert.json says (sha256 {digest}, not {one.sha256}): build the expert again"
            )


def _complete(expert: Expert, target: str, files: Files, notes: Notes, signer: Signer | None) -> None:
    """Adds what every bundle has to what its target put in."""
    from cusprun.deploy.readme import write_readme

    shipped, origin, figures = _shipped(expert, files), trace(expert), None
    for name, one in shipped.items():
        if _is_built(expert, one) and (figures := read_figures(expert, one)) is not None:
            shipped = {name: one, **shipped}  # it comes first in the card
            break
    hashes = {name: source.sha256() for name, source in files}
    files.add("expert.json", _card(expert, shipped, origin, measured=figures is not None))
    files.add(CARD, write_card(expert, shipped, figures, origin))
    add_licences(files, origin)
    files.add(BOM, write_bom(expert, hashes, figures, origin, target))
    files.add(README, write_readme(expert, target, notes, origin, signer.fingerprint if signer else None))
    names = Names()
    for name in (MANIFEST, SIGNATURE, *(name for name, _ in files)):
        path = f"{_top(expert, target)}/{name}"
        if (reason := names.take(path)) is not None:
            raise InvalidRequest(f"{path} cannot be in a bundle: it {reason}; build the expert with a shorter --name")
    if len(files) > MOST_FILES:
        raise InvalidRequest(f"the bundle would have {len(files)} files, and {MOST_FILES} are the most")


def _top(expert: Expert, target: str) -> str:
    """The folder that an archive puts around its files."""
    return f"{expert.name}-{target}"


def _shipped(expert: Expert, files: Files) -> dict[str, Artifact]:
    """The artifacts that a target took as they are, by their names in the bundle."""
    found: dict[str, Artifact] = {}
    for name, source in files:
        for one in expert.artifacts:
            if isinstance(source.content, Path) and source.content == one.path:
                found[name] = one
            elif isinstance(source.content, Path) and one.path in source.content.parents:
                inside = source.content.relative_to(one.path).as_posix()
                found.setdefault(name.removesuffix(f"/{inside}"), one)
    return found


def _card(expert: Expert, shipped: Mapping[str, Artifact], origin: Provenance, *, measured: bool) -> str:
    """expert.json as the receiver gets it: artifacts by their places in the bundle, and no path of the maker's."""
    card = expert.card
    entries = {entry["sha256"]: entry for entry in card["artifacts"]}
    kept: dict[str, Any] = {
        key: card[key] for key in ("schema_version", "name", "cusprun", "scenario", "expert") if key in card
    }
    kept["base"] = {**card["base"], "id": origin.hub_id or origin.base}
    kept["method"] = card.get("method")
    kept["artifacts"] = [
        {
            **entries.get(
                one.sha256, {"format": one.format, "quant": one.quant, "bytes": one.bytes, "sha256": one.sha256}
            ),
            "path": name,
        }
        for name, one in shipped.items()
    ]
    first = card["artifacts"][0]["sha256"] if card["artifacts"] else None  # the figures are of this one
    own = measured and next(iter(shipped.values())).sha256 == first
    kept["figures"] = card.get("figures") if own else None
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _is_per_layer(expert: Expert, files: Files) -> bool:
    """Whether a GGUF is shipped whose layers have widths of their own."""
    hashes = {one.sha256 for one in _shipped(expert, files).values() if one.format == "gguf"}
    return any(entry["sha256"] in hashes and entry.get("arch") in PER_LAYER for entry in expert.card["artifacts"])


def _is_built(expert: Expert, artifact: Artifact) -> bool:
    """Whether an artifact is one of the build, and not one that was written to be shipped."""
    return artifact.sha256 in {entry["sha256"] for entry in expert.card["artifacts"]}


def _write(expert: Expert, target: str, files: Files, notes: Notes, signer: Signer | None, places: _Places) -> Bundle:
    """Writes folder and archive, each whole or not at all."""
    top = _top(expert, target)
    first = places.folder or places.archive
    assert first is not None
    first.parent.mkdir(parents=True, exist_ok=True)
    room = aside(first)  # on the same disk, so that a rename ends it
    room.mkdir()
    try:
        folder = room / top
        folder.mkdir()
        say(f"ship: {len(files)} files for a {target}")
        entries = tuple(_copy(folder / name, name, source) for name, source in files)
        manifest = Manifest(expert.name, target, signer.fingerprint if signer else None, entries)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        if signer is not None:
            hashes = {entry.path: entry.sha256 for entry in entries}
            signer.sign(top, {**hashes, MANIFEST: sha256_file(folder / MANIFEST)}, folder / SIGNATURE)
        if places.archive is not None:
            packed = room / f"packed{places.archive.suffix}"
            kind = archive_kind(places.archive)
            assert kind is not None
            say(f"ship: packing {places.archive.name}")
            write_archive(packed, kind, top, _packed(folder, manifest))
        if places.folder is not None:
            with folder_written_whole(places.folder) as part:
                part.rmdir()
                folder.rename(part)
        digest = None
        if places.archive is not None:
            digest = sha256_file(packed)
            packed.replace(places.archive)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    size = sum(entry.bytes for entry in entries)
    return Bundle(
        expert.name, target, places.folder, places.archive, digest, manifest.digest, len(entries), size,
        manifest.signer, notes,
    )  # fmt: skip


def _copy(path: Path, name: str, source: Source) -> Entry:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source.content, bytes):
        path.write_bytes(source.content)
    else:
        shutil.copyfile(source.content, path)
    path.chmod(0o755 if source.executable else 0o644)
    return Entry(name, path.stat().st_size, sha256_file(path), source.executable)


def _packed(folder: Path, manifest: Manifest) -> list[Packed]:
    """Manifest and signature first, so that a reader knows early what comes."""
    own = [name for name in (MANIFEST, SIGNATURE) if (folder / name).is_file()]
    rows = [Packed(name, folder / name, (folder / name).stat().st_size, False) for name in own]
    return rows + [Packed(one.path, folder / one.path, one.bytes, one.executable) for one in manifest.files]
