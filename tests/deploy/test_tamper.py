"""Tampering with a bundle: whatever is done to any of its files, `verify` finds it and says which."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cusprun.deploy.manifest import MANIFEST, SIGNATURE, Entry, Manifest, read_manifest
from cusprun.deploy.ship import ship
from cusprun.deploy.signing import Signer, make_key
from cusprun.deploy.verify import unpack, verify
from cusprun.errors import Failed

FLIPS = 1000


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key(tmp_path_factory.mktemp("keys") / "expert-key")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, pico_expert: Path, keys: tuple[Path, Path]) -> Path:
    """A signed bundle's folder; its archive lies beside it."""
    out = tmp_path_factory.mktemp("bundles") / "pico"
    ship(pico_expert, "laptop", out, sign_key=keys[0])
    return out


@pytest.fixture
def bundle(tmp_path: Path, shipped: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(shipped, copy)
    return copy


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(bundle: Path, key: Path | None = None) -> str:
    with pytest.raises(Failed) as error:
        verify(bundle, key)
    return str(error.value)


def test_an_untouched_bundle_holds(bundle: Path, shipped: Path, keys: tuple[Path, Path]) -> None:
    assert verify(bundle).signature == "unverified"
    found = verify(bundle, keys[1])
    assert (found.signature, found.name, found.target) == ("verified", "pico-legal", "laptop")
    assert verify(shipped.with_name("pico.zip"), keys[1]) == found
    assert found.bytes == sum((bundle / name).stat().st_size for name in names(bundle)
                              if name not in (MANIFEST, SIGNATURE))  # fmt: skip


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "rewritten": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name(f"{path.name}.old")),
    "moved": lambda path: path.rename(path.parent.parent / path.name),
    "case": lambda path: path.rename(path.with_name(path.name.swapcase())),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.parent.parent / "aside"), path.symlink_to(path.parent.parent / "aside")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}

IN_THE_SIGNATURE = ("changed", "rewritten")  # what only who has the key can see, where the form stays


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_to_any_file_is_found(tmp_path: Path, shipped: Path, keys: tuple[Path, Path], change: str) -> None:
    every = names(shipped)
    assert {MANIFEST, SIGNATURE, "README.md", "LICENSES/MIT.txt", "pico-legal-q8_0.gguf"} <= set(every)
    for number, name in enumerate(every):
        copy = tmp_path / str(number) / "bundle"
        shutil.copytree(shipped, copy)
        CHANGES[change](copy / name)
        message = refused(copy, keys[1])
        if name != MANIFEST and not (name == SIGNATURE and change in IN_THE_SIGNATURE):
            assert Path(name).name in message
            refused(copy)  # without a key, too


def test_what_is_added_is_found(bundle: Path) -> None:
    for name in ("x", ".git/config", ".gitattributes", "LICENSES/x.txt", "start.sh.bak", "MANIFEST.json", "\udcff"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(b"#!/bin/sh\n")
        assert "was added" in refused(bundle)
        (bundle / name).unlink()
    assert "'.git/' is an empty folder" in refused(bundle)
    (bundle / "linked").symlink_to(bundle / "LICENSES", target_is_directory=True)
    assert "'linked' is a link" in refused(bundle)
    (bundle / "linked").unlink()
    (bundle / ".git").rmdir()
    verify(bundle)


def test_swapped_and_renamed_files_are_named(bundle: Path) -> None:
    one, two = bundle / "README.md", bundle / "MODEL_CARD.md"
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    message = refused(bundle)
    assert "README.md holds what belongs in MODEL_CARD.md" in message
    assert "MODEL_CARD.md holds what belongs in README.md" in message
    one.write_bytes(contents[0])
    two.rename(bundle / "CARD.md")
    (bundle / "CARD.md").write_bytes(contents[1])
    assert "MODEL_CARD.md is called 'CARD.md'" in refused(bundle)


def test_a_thousand_random_bytes_of_the_folder(bundle: Path, keys: tuple[Path, Path]) -> None:
    chance = random.Random(20261123)
    every = [bundle / name for name in names(bundle)]
    seen = set()
    for _ in range(FLIPS):
        path = chance.choice(every)
        place, mask = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        content = path.read_bytes()
        path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        with pytest.raises(Failed):
            # A signature is only known to be wrong by who has the key.
            verify(bundle, keys[1] if path.name == SIGNATURE else None)
        path.write_bytes(content)
        seen.add(path.name)
    assert len(seen) == len(every)
    verify(bundle, keys[1])


@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_a_thousand_random_bytes_of_the_archive(
    tmp_path: Path, pico_expert: Path, keys: tuple[Path, Path], kind: str
) -> None:
    path = tmp_path / f"pico.{kind}"
    ship(pico_expert, "laptop", path, sign_key=keys[0])
    content, chance = bytearray(path.read_bytes()), random.Random(7)
    for number in range(FLIPS // 2):
        place, mask = chance.randrange(len(content)), chance.randrange(1, 256)
        content[place] ^= mask
        path.write_bytes(content)
        with pytest.raises(Failed):
            verify(path) if number % 50 else unpack(path, tmp_path / "out")
        content[place] ^= mask
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.write_bytes(content)
    assert verify(path, keys[1]).signature == "verified"


def rewrite(bundle: Path, **fields: object) -> None:
    """What one does who changes files on purpose: the manifest anew, as the program itself writes it."""
    manifest = read_manifest((bundle / MANIFEST).read_bytes())
    files = tuple(
        Entry(name, (bundle / name).stat().st_size, hashlib.sha256((bundle / name).read_bytes()).hexdigest(),
              name.endswith(".sh"))
        for name in names(bundle) if name not in (MANIFEST, SIGNATURE)
    )  # fmt: skip
    values = {"name": manifest.name, "target": manifest.target, "signer": manifest.signer, "files": files, **fields}
    (bundle / MANIFEST).write_bytes(Manifest(**values).to_bytes())  # type: ignore[arg-type]


def test_a_manifest_written_anew_needs_the_key_to_be_found(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "start.sh").write_text("#!/bin/sh\nrm -rf /\n")
    rewrite(bundle)
    assert verify(bundle).signature == "unverified"  # and says so
    message = refused(bundle, keys[1])
    assert "does not hold" in message
    assert "start.sh" in message
    rewrite(bundle, signer=None)
    assert "model.sig" in refused(bundle)
    (bundle / SIGNATURE).unlink()
    assert verify(bundle).signature == "none"
    assert "is not signed" in refused(bundle, keys[1])


def test_a_signature_by_another_key_is_no_signature(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (bundle / "start.sh").write_text("#!/bin/sh\nrm -rf /\n")
    private, public = make_key(tmp_path / "evil")
    signer = Signer(private)
    for name_it in (True, False):  # the manifest names the key that signed, or goes on naming the other
        rewrite(bundle, **({"signer": signer.fingerprint} if name_it else {"signer": Signer(keys[0]).fingerprint}))
        hashes = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in names(bundle)}
        del hashes[SIGNATURE]
        signer.sign("pico-legal-laptop", hashes, bundle / SIGNATURE)
        assert "does not hold" in refused(bundle, keys[1])
    assert "names another key" in refused(bundle, public)


def test_the_signature_of_another_bundle(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path, pico_expert: Path
) -> None:
    ship(pico_expert, "server", tmp_path / "other", archive="none", sign_key=keys[0])
    shutil.copy(tmp_path / "other" / SIGNATURE, bundle / SIGNATURE)
    assert "does not hold" in refused(bundle, keys[1])


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 10**5, b'{"schema_version": 2}', b'{"schema_version": 1, "files": 3}'],
)
def test_manifests_that_are_none(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert MANIFEST in refused(bundle)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("../x", 1, "0" * 64, False), "leaves the bundle's folder"),
        (Entry("/x", 1, "0" * 64, False), "absolute path"),
        (Entry(MANIFEST, 1, "0" * 64, False), "comes twice"),
        (Entry("x", -1, "0" * 64, False), "no size and sha256"),
        (Entry("x", True, "0" * 64, False), "no size and sha256"),
        (Entry("x", 1, "0" * 63, False), "no size and sha256"),
        (Entry(["x"], 1, "0" * 64, False), "is no path"),  # type: ignore[arg-type]
    ],
)
def test_manifests_that_cannot_be(bundle: Path, entry: Entry, message: str) -> None:
    rewrite(bundle, files=(entry,))
    assert message in refused(bundle)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": f"x\nsigned by the key {'ab' * 32}: nothing was changed since\x1b[8m"}, "the name 'x\\nsigned by"),
        ({"name": "a/b"}, "the name 'a/b' is none"),
        ({"name": ""}, "the name '' is none"),
        ({"name": 3}, "the name 3 is none"),
        ({"target": "toaster\x1b[8m"}, "the target 'toaster\\x1b[8m' is none of laptop, phone"),
        ({"target": ["laptop"]}, "the target ['laptop'] is none of"),
        ({"signer": ""}, "the signer '' is no sha256"),
        ({"signer": False}, "the signer False is no sha256"),
        ({"signer": "ab" * 32 + "\n"}, "is no sha256 of a key"),
        ({"signer": "AB" * 32}, "is no sha256 of a key"),
    ],
)
def test_manifests_whose_words_cannot_be(
    bundle: Path, keys: tuple[Path, Path], fields: dict[str, object], message: str
) -> None:
    (bundle / SIGNATURE).unlink()
    rewrite(bundle, **{"signer": None, **fields})
    for key in (None, keys[1]):
        found = refused(bundle, key)
        assert message in found
        assert found.isprintable()


def test_no_name_in_the_folder_is_printed_as_it_is(bundle: Path) -> None:
    (bundle / "x\x1b[8m").mkdir()
    (bundle / "y\nevery file is what the manifest says").symlink_to(bundle)
    message = refused(bundle)
    assert "'x\\x1b[8m/' is an empty folder" in message
    assert "'y\\nevery file is what the manifest says' is a link" in message


def test_large_manifests_are_not_read(bundle: Path) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(1 << 32)
    assert "at most make sense" in refused(bundle)


def test_deep_folders(bundle: Path) -> None:
    deep = bundle
    for _ in range(130):
        deep /= "d"
        deep.mkdir()
    assert "deeper than" in refused(bundle)


def test_unpacked_is_what_was_shipped(tmp_path: Path, shipped: Path, keys: tuple[Path, Path]) -> None:
    found = unpack(shipped.with_name("pico.zip"), tmp_path / "out", keys[1])
    assert found.signature == "verified"
    assert names(tmp_path / "out") == names(shipped)
    for name in names(shipped):
        one, two = tmp_path / "out" / name, shipped / name
        assert one.read_bytes() == two.read_bytes()
        assert one.stat().st_mode == two.stat().st_mode
    assert os.access(tmp_path / "out" / "start.sh", os.X_OK)
    verify(tmp_path / "out", keys[1])


def test_json_of_the_manifest(shipped: Path) -> None:
    document = json.loads((shipped / MANIFEST).read_bytes())
    assert document["schema_version"] == 1
    assert {"path", "bytes", "sha256", "executable"} == set(document["files"][0])
    assert [row["path"] for row in document["files"] if row["executable"]] == ["start.sh"]
