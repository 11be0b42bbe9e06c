"""Members come out of real-looking archives; hostile ones are refused before a parser sees a byte."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from cusprun.corpora import archives
from cusprun.corpora.archives import read_members
from cusprun.errors import Failed
from tests.corpora.archives_made import make_deb, make_npm, make_wheel

FILES = {"data/one.txt": "eins", "data/two.txt": "zwei", "other.bin": b"\0\1"}


@pytest.mark.parametrize(("make", "name"), [(make_wheel, "a.whl"), (make_npm, "a.tgz"), (make_deb, "a.deb")])
def test_wanted_members_come_out(tmp_path: Path, make, name: str) -> None:
    path = make(tmp_path / name, FILES)
    assert dict(read_members(path, ["data/*.txt"])) == {"data/one.txt": b"eins", "data/two.txt": b"zwei"}


def test_debian_members_lose_their_leading_dot(tmp_path: Path) -> None:
    path = make_deb(tmp_path / "a.deb", {"./usr/share/doc/a.txt": "text"})
    assert dict(read_members(path, ["usr/share/*"])) == {"usr/share/doc/a.txt": b"text"}


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "data/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize(("make", "kind"), [(make_wheel, "a.whl"), (make_npm, "a.tgz"), (make_deb, "a.deb")])
def test_names_that_point_outside_are_refused(tmp_path: Path, make, kind: str, name: str) -> None:
    path = make(tmp_path / kind, {name: "evil", "data/one.txt": "eins"})
    with pytest.raises(Failed, match="outside the archive"):
        list(read_members(path, ["data/*"]))


@pytest.mark.parametrize(("make", "kind"), [(make_npm, "a.tgz"), (make_deb, "a.deb")])
def test_wanted_links_are_refused_and_others_ignored(tmp_path: Path, make, kind: str) -> None:
    path = make(tmp_path / kind, {"data/one.txt": "eins"}, {"data/link.txt": "/etc/passwd", "elsewhere": "data"})
    assert list(read_members(path, ["data/one*"])) == [("data/one.txt", b"eins")]
    with pytest.raises(Failed, match="link"):
        list(read_members(path, ["data/*"]))


def test_links_in_zip_files_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("data/link.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(Failed, match="link"):
        list(read_members(tmp_path / "a.whl", ["data/*"]))


@pytest.mark.parametrize(("make", "kind"), [(make_wheel, "a.whl"), (make_npm, "a.tgz"), (make_deb, "a.deb")])
def test_bombs_are_refused(tmp_path: Path, make, kind: str) -> None:
    bomb = bytes(archives.MEMBER_LIMIT + 1)
    path = make(tmp_path / kind, {"data/bomb.txt": bomb})
    assert path.stat().st_size < archives.MEMBER_LIMIT // 100
    with pytest.raises(Failed, match="unpacks to more than"):
        list(read_members(path, ["data/*"]))


@pytest.mark.parametrize(("make", "kind"), [(make_wheel, "a.whl"), (make_npm, "a.tgz"), (make_deb, "a.deb")])
@pytest.mark.parametrize("keep", [0, 7, 90])
def test_truncated_archives_are_a_message(tmp_path: Path, make, kind: str, keep: int) -> None:
    path = make(tmp_path / kind, FILES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Failed, match=r"damaged|not a Debian package|no data\.tar"):
        list(read_members(path, ["data/*"]))


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(Failed, match="not a kind of archive"):
        list(read_members(tmp_path / "a.rar", ["*"]))
