"""Archives: the same files give the same bytes, and of hostile or damaged ones nothing gets out."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cusprun.deploy import archive, stored_zip, tar_zst
from cusprun.deploy.archive import read_archive, write_archive
from cusprun.deploy.members import Packed
from cusprun.deploy.names import LONGEST, why_refused
from cusprun.deploy.verify import unpack, verify
from cusprun.errors import Failed, InvalidRequest

TOP = "pico-laptop"
KINDS = ("tar.zst", "zip")


def packed(folder: Path, files: dict[str, bytes]) -> list[Packed]:
    rows = []
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        rows.append(Packed(name, path, len(content), name.endswith(".sh")))
    return rows


FILES = {"a.txt": b"a" * 1000, "b/c.bin": os.urandom(3000), "empty": b"", "start.sh": b"#!/bin/sh\n", "b/ä.txt": b"\n"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_in_comes_out_and_other_programs_read_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    write_archive(path, kind, TOP, packed(tmp_path / "in", FILES))
    found = {member.name: (b"".join(member.pieces), member.executable) for member in read_archive(path)}
    assert found == {name: (content, name.endswith(".sh")) for name, content in FILES.items()}
    if kind == "zip":
        with zipfile.ZipFile(path) as other:
            assert other.testzip() is None
            assert {name: other.read(f"{TOP}/{name}") for name in FILES} == FILES
            assert other.getinfo(f"{TOP}/start.sh").external_attr >> 16 == 0o100755
    else:
        plain = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
        with tarfile.open(fileobj=io.BytesIO(plain)) as other:
            members = {member.name: member for member in other}
            assert {name: other.extractfile(members[f"{TOP}/{name}"]).read() for name in FILES} == FILES  # type: ignore[union-attr]
        assert {(one.mtime, one.uid, one.uname) for one in members.values()} == {(0, 0, "")}
        assert members[f"{TOP}/start.sh"].mode == 0o755


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_depend_on_nothing_but_the_files(tmp_path: Path, kind: str) -> None:
    for number, place in enumerate(("one", "another/place")):
        rows = packed(tmp_path / place, FILES)
        for row in rows:
            os.utime(row.path, (number * 10**9, number * 10**9))
            row.path.chmod(0o600 + number * 0o044)
        write_archive(tmp_path / f"{number}.{kind}", kind, TOP, rows)
    assert (tmp_path / f"0.{kind}").read_bytes() == (tmp_path / f"1.{kind}").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_byte_and_any_cut_is_found(tmp_path: Path, kind: str) -> None:
    """Every byte of a small archive, not some at random; also where no file changes by it."""
    path, damaged = tmp_path / f"x.{kind}", tmp_path / f"damaged.{kind}"
    files = {"a.txt": b"The tenant pays the rent. " * 9, "b.bin": bytes(range(64)), "s.sh": b"x"}
    write_archive(path, kind, TOP, packed(tmp_path / "in", files))
    content = path.read_bytes()

    def read(changed: bytes) -> dict[str, tuple[bytes, bool]]:
        damaged.write_bytes(changed)
        return {member.name: (b"".join(member.pieces), member.executable) for member in read_archive(damaged)}

    assert read(content) == {name: (data, name == "s.sh") for name, data in files.items()}
    for place in range(len(content)):
        bit = 1 << place % 8
        with pytest.raises(Failed):
            read(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    for length in range(0, len(content), 7):
        with pytest.raises(Failed):
            read(content[:length])
    for behind in (b"\0", b"x", content):
        with pytest.raises(Failed):
            read(content + behind)


# hostile archives ----------------------------------------------------------------------------------------------------


def tar(*members: tuple[tarfile.TarInfo, bytes], tail: bytes = bytes(1024)) -> bytes:
    content = b"".join(
        info.tobuf(tarfile.USTAR_FORMAT if info.size >= 0 else tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        + data
        + bytes(-len(data) % 512)
        for info, data in members
    )
    return compressed(content + tail)


def compressed(content: bytes, window: int = tar_zst.WINDOW_BITS) -> bytes:
    settings = zstandard.ZstdCompressionParameters(window_log=window, write_checksum=True, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return sealed(stream.compress(content) + stream.flush())


def sealed(frame: bytes) -> bytes:
    return frame + tar_zst.SEAL + hashlib.sha256(frame).digest()


def entry(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, 0o644, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def zipped(*names: str, mode: int = 0o100644, method: int = zipfile.ZIP_STORED, data: bytes = b"x") -> bytes:
    """A .zip in our own form, so that the names or modes alone are what is wrong with it."""
    if method != zipfile.ZIP_STORED:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as file:
            for name in names:
                info = zipfile.ZipInfo(name)
                info.external_attr, info.compress_type = mode << 16, method
                file.writestr(info, data)
        return buffer.getvalue()
    body, central = b"", []
    for name in names:
        local, line = stored_zip.zip_headers(name, len(data), zlib.crc32(data), False, len(body))
        line = line[:38] + struct.pack("<I", mode << 16) + line[42:]
        body, central = body + local + data, [*central, line]
    directory = b"".join(central)
    return body + directory + stored_zip.zip_end(len(central), len(directory), len(body))


def patched_size(content: bytes) -> bytes:
    """The second and third size of the first file's line in the directory, made huge."""
    at = content.index(b"PK\x01\x02")
    return content[: at + 20] + struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00) + content[at + 28 :]


FOLDER = f"{TOP}/"
HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "tar-up": ("tar.zst", lambda: tar(entry(f"{FOLDER}../../evil")), "leaves the bundle's folder by"),
    "zip-up": ("zip", lambda: zipped(f"{FOLDER}../../evil"), "leaves the bundle's folder by"),
    "tar-backslashes": ("tar.zst", lambda: tar(entry(f"{FOLDER}..\\..\\evil")), "leaves the bundle's folder by"),
    "zip-backslash": ("zip", lambda: zipped(f"{FOLDER}a\\b"), "a character in its name that is not allowed"),
    "tar-absolute": ("tar.zst", lambda: tar(entry("/tmp/evil")), "absolute path"),
    "zip-absolute": ("zip", lambda: zipped("/tmp/evil"), "absolute path"),
    "zip-drive": ("zip", lambda: zipped("C:/evil"), "absolute path"),
    "zip-stream": ("zip", lambda: zipped(f"{FOLDER}a.txt:evil"), "a character in its name that is not allowed"),
    "tar-symlink": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", tarfile.SYMTYPE, linkname="/etc")), "is a link"),
    "tar-hard-link": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", tarfile.LNKTYPE, linkname="b")), "is a link"),
    "zip-symlink": ("zip", lambda: zipped(f"{FOLDER}a", mode=0o120777), "is a link"),
    "tar-device": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", tarfile.CHRTYPE)), "is a device"),
    "tar-pipe": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", tarfile.FIFOTYPE)), "is a pipe"),
    "tar-folder": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", tarfile.DIRTYPE)), "is a folder"),
    "zip-folder": ("zip", lambda: zipped(f"{FOLDER}a/"), "is a folder"),
    "tar-sparse": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", tarfile.GNUTYPE_SPARSE)), "a file with holes"),
    "tar-pax": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"9 a=b\n", b"x")), "a kind that is not a file"),
    "tar-twice": ("tar.zst", lambda: tar(entry(f"{FOLDER}a"), entry(f"{FOLDER}a")), "comes twice"),
    "zip-twice": ("zip", lambda: zipped(f"{FOLDER}a", f"{FOLDER}a"), "comes twice"),
    "tar-case": ("tar.zst", lambda: tar(entry(f"{FOLDER}a"), entry(f"{FOLDER}A")), "in upper and lower case alone"),
    "zip-case-ß": ("zip", lambda: zipped(f"{FOLDER}ß", f"{FOLDER}SS"), "in upper and lower case alone"),
    "zip-case-folder": ("zip", lambda: zipped(f"{FOLDER}d/a", f"{FOLDER}D/b"), "in upper and lower case alone"),
    "zip-decomposed": ("zip", lambda: zipped(f"{FOLDER}a\u0308"), "composed form"),
    "zip-file-and-folder": ("zip", lambda: zipped(f"{FOLDER}a", f"{FOLDER}a/b"), "which is a file"),
    "zip-folder-and-file": ("zip", lambda: zipped(f"{FOLDER}a/b", f"{FOLDER}a"), "is a file and a folder"),
    "zip-reserved": ("zip", lambda: zipped(f"{FOLDER}NUL.txt"), "a device on Windows"),
    "zip-dot-at-the-end": ("zip", lambda: zipped(f"{FOLDER}a."), "ends with a dot"),
    "zip-control": ("zip", lambda: zipped(f"{FOLDER}a\x1b[2J"), "control characters"),
    "tar-no-utf-8": ("tar.zst", lambda: tar(entry(f"{FOLDER}a\udcff")), "control characters"),
    "zip-long": ("zip", lambda: zipped(FOLDER + "a/" * 120 + "b"), "more than 240 bytes"),
    "zip-two-tops": ("zip", lambda: zipped("x/a", "y/a"), "the one folder"),
    "zip-no-top": ("zip", lambda: zipped("a"), "the one folder"),
    "zip-nothing": ("zip", lambda: zipped(), "is empty"),
    "tar-nothing": ("tar.zst", lambda: tar(), "is empty"),
    "zip-bomb": ("zip", lambda: zipped(f"{FOLDER}a", method=zipfile.ZIP_DEFLATED, data=bytes(10**6)), "is compressed"),
    "zip-size-lie": ("zip", lambda: patched_size(zipped(f"{FOLDER}a")), "would unpack to more than"),
    "zip-garbage": ("zip", lambda: b"PK\x05\x06" + bytes(40), "does not end as a .zip"),
    "zip-two-directories": ("zip", lambda: zipped("x/a") + zipped("x/b"), "its directory is not where"),
    "zip-many": ("zip", lambda: zipped(*(f"{FOLDER}{n}" for n in range(63))), "more than 60 files"),
    "tar-many": ("tar.zst", lambda: tar(*(entry(f"{FOLDER}{n}", b"") for n in range(63))), "more than 60 files"),
    "tar-bomb": ("tar.zst", lambda: compressed(
        entry(f"{FOLDER}a", b"", size=2**38)[0].tobuf(tarfile.GNU_FORMAT) + bytes(2**22)), "would unpack to more than"),
    "tar-bomb-of-many": ("tar.zst", lambda: tar(*(entry(f"{FOLDER}{n}", bytes(2**20)) for n in range(20))),
                         "would unpack to more than 8 MiB"),
    "tar-bomb-behind-the-end": ("tar.zst", lambda: tar(entry(f"{FOLDER}a"), tail=bytes(2**26)), "behind its end"),
    "tar-negative": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", b"", size=-1)), "a size that cannot be"),
    "tar-truncated": ("tar.zst", lambda: sealed(tar(entry(f"{FOLDER}a", b"x" * 10**4))[:-60]), "ends before its end"),
    "tar-unsealed": ("tar.zst", lambda: tar(entry(f"{FOLDER}a"))[:-40], "does not end as a .tar.zst of ours"),
    "tar-second-frame": ("tar.zst", lambda: sealed(tar(entry(f"{FOLDER}a")) * 2), "behind its end"),
    "tar-wide-window": ("tar.zst", lambda: compressed(bytes(2**12), window=30), "does not begin as"),
    "tar-plain": ("tar.zst", lambda: sealed(entry("x/a")[0].tobuf(0) + bytes(1024)), "does not begin as"),
    "tar-other-owner": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", uid=1000, uname="me")), "not as .* writes it"),
    "tar-setuid": ("tar.zst", lambda: tar(entry(f"{FOLDER}a", mode=0o4755)), "not as .* writes it"),
    "tar-padding": ("tar.zst", lambda: compressed(
        entry(f"{FOLDER}a")[0].tobuf(0) + b"x" + b"hidden".ljust(511, b"\0") + bytes(1024)), "something stands behind"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_gets_out_of_a_hostile_archive(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (archive, stored_zip):
        monkeypatch.setattr(module, "MOST_FILES", 60)
    monkeypatch.setattr(archive, "SMALL", 8 << 20)
    kind, make, message = HOSTILE[case]
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    path = place / f"hostile.{kind}"
    path.write_bytes(make())
    before = sorted(tmp_path.rglob("*"))
    for read in (lambda: verify(path), lambda: unpack(path, place / "out")):
        with pytest.raises(Failed, match=message):
            read()
    assert sorted(tmp_path.rglob("*")) == before  # no file, no folder, no part of one


@pytest.mark.parametrize(("count", "read"), [(0, False), (1, False), (7, True)])
def test_of_a_zip_no_more_is_read_than_its_files_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, read: bool
) -> None:
    """The end may say that the whole file is the directory."""
    size = 7 * (stored_zip.CENTRAL.size + LONGEST)
    path = tmp_path / "x.zip"
    path.write_bytes(bytes(size) + stored_zip.zip_end(count, size, 0))
    asked: list[str] = []
    monkeypatch.setattr(stored_zip, "_zip_member", lambda *_: asked.append("read") or stored_zip.damaged(path, "read"))
    with pytest.raises(Failed, match="is damaged: read" if read else "a path of more than 240 bytes"):
        list(stored_zip.read_zip(path))
    assert bool(asked) == read


@pytest.mark.parametrize(
    "name", ["", "/a", "a//b", "a/./b", "../a", "a/..", "CON", "a/lpt1.txt", "a ", " a", "a/b.", "a\n", "a?", "\ud800"]
)
def test_names_that_no_bundle_has(name: str) -> None:
    assert why_refused(name) is not None


def test_names_that_are_fine() -> None:
    for name in ("a", "a/b c.txt", "LICENSES/GPL-2.0-or-later.txt", "..a/b..c", "ü/ß.txt", ".hidden"):
        assert why_refused(name) is None, name


def test_a_file_that_changes_while_it_is_packed(tmp_path: Path) -> None:
    rows = packed(tmp_path / "in", {"a": b"123"})
    for size in (2, 4):
        with pytest.raises(Failed, match="changed while it was packed"):
            write_archive(tmp_path / f"{size}.zip", "zip", TOP, [Packed("a", rows[0].path, size, False)])


def test_a_zip_has_an_end(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(InvalidRequest, match=r"4 GiB at most: write --archive tar\.zst"):
        stored_zip.zip_headers("a", 2**32, 0, False, 0)


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.rar"
    path.write_bytes(b"Rar!")
    with pytest.raises(InvalidRequest, match="name a folder"):
        verify(path)
    with pytest.raises(InvalidRequest, match="no such bundle"):
        verify(tmp_path / "absent.zip")
    with pytest.raises(InvalidRequest, match="is no archive"):
        unpack(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_an_archive_holds_it_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Damage within the seal, and to a .zip: a message of ours, never another error, and nothing outside the folder."""
    path, chance = tmp_path / f"x.{kind}", random.Random(11)
    write_archive(path, kind, TOP, packed(tmp_path / "in", FILES))
    content = path.read_bytes()
    if kind == "tar.zst":
        content = zstandard.ZstdDecompressor().stream_reader(content).read()
    headers = [place for place in range(len(content)) if content[place : place + 3] in (b"PK\x01", b"PK\x03", b"pic")]
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(chance.randrange(1, 5)):
            at = min(chance.choice(headers) + chance.randrange(520), len(damaged) - 1)
            damaged[at : at + 1] = chance.choice((b"", b"\0", b"\xff", b"../", b"7", chance.randbytes(1), bytes(12)))
        path.write_bytes(compressed(bytes(damaged)) if kind == "tar.zst" else bytes(damaged))
        try:
            for member in read_archive(path):
                assert why_refused(member.name) is None
                for _piece in member.pieces:
                    pass
        except Failed:
            refused += 1
    assert refused > 300
