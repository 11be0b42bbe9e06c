"""What a browser bundle holds, without opening it: files and hashes, licences, the packages that it is made of."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Wish, find_target, wllama
from cusprun.deploy.targets.browser import PIECE, choose_artifact, gather
from cusprun.deploy.targets.wllama import FOLDER, Package, fetch_wllama
from cusprun.doctor import _has_wllama
from cusprun.errors import Failed, InvalidRequest
from tests.deploy.bundles_made import make_expert

pytestmark = pytest.mark.browser  # they need npm's packages as the others do


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Expert:
    return make_expert(tmp_path_factory.mktemp("expert"))


@pytest.fixture(scope="module")
def bundle(expert: Expert) -> dict[str, bytes]:
    files = Files()
    assert find_target("browser") is gather
    gather(expert, files, Wish())
    return {name: source.read() for name, source in files}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_every_file_that_the_page_needs_is_listed_with_its_hash(bundle: dict[str, bytes]) -> None:
    worker = bundle["sw.js"].decode()
    found = re.search(r"const SHELL = (\{.*?\});\nconst KEPT = (\[.*?\]);\n", worker, re.DOTALL)
    assert found
    shell, kept = json.loads(found[1]), json.loads(found[2])
    assert shell == {name: sha256(bundle[name]) for name in shell}
    settings = json.loads(bundle["bundle.json"])
    large = [*settings["model"], *(one for build in settings["engine"].values() for one in build.values())]
    assert sorted(kept) == sorted(f"{one['path']}?sha256={one['sha256']}" for one in large)
    for one in large:
        content = bundle[one["path"]]
        assert (one["bytes"], one["sha256"]) == (len(content), sha256(content))
        assert one["pieces"] == [sha256(content[at : at + PIECE]) for at in range(0, len(content), PIECE)]
    rest = set(bundle) - set(shell) - {one["path"] for one in large}
    assert rest == {"sw.js", "_headers", "LICENSES/wllama.txt", "LICENSES/llama.cpp.txt", "LICENSES/webassembly.txt"}
    for page in ("index.html", "app.js", "engine.js", "style.css", "manifest.webmanifest"):
        for name in re.findall(rb'(?:from|href=|src=|"src": ?) ?"(?:\./)?([^"#]+)"', bundle[page]):
            assert name.decode() in shell, f"{page} needs {name!r}"


def test_nothing_of_ours_names_another_host(bundle: dict[str, bytes]) -> None:
    ours = [name for name in bundle if not name.startswith(("wllama/", "LICENSES/", "model/"))]
    for name in ours:
        hosts = set(re.findall(rb"https?://[\w.]+", bundle[name])) - {b"http://www.w3.org"}
        assert hosts == set(), name


def test_the_same_expert_gives_the_same_bytes(expert: Expert, bundle: dict[str, bytes]) -> None:
    files = Files()
    notes = gather(expert, files, Wish())
    assert {name: source.read() for name, source in files} == bundle
    again = gather(expert, Files(), Wish())
    assert notes == again
    other = Files()
    gather(replace(expert, name="another"), other, Wish())
    assert dict(other)["sw.js"].read() != bundle["sw.js"]


def test_the_receiver_is_told_about_threads_and_sizes(expert: Expert) -> None:
    notes = gather(expert, Files(), Wish())
    for words in ("Cross-Origin-Embedder-Policy: require-corp", "nginx", "_headers", "GitHub Pages", "http.server"):
        assert words in notes.start
    assert "Slow type" not in notes.start
    slow = replace(expert, artifacts=(replace(expert.artifacts[0], quant="f16"),))
    assert "f16 is large, and slow in a browser" in gather(slow, Files(), Wish()).start


def test_parts_are_below_the_limit_and_gone_with_the_files(
    expert: Expert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = fetch_wllama()
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path))
    monkeypatch.setattr("cusprun.deploy.targets.browser.fetch_wllama", lambda: cached)
    files = Files()
    gather(expert, files, Wish(), most=60_000)
    parts = {name: source.content for name, source in files if name.startswith("model/")}
    assert len(parts) > 2
    assert all(isinstance(path, Path) and path.stat().st_size <= 60_000 for path in parts.values())
    del files
    assert not any(isinstance(path, Path) and path.exists() for path in parts.values())
    assert list(tmp_path.iterdir()) == []


def test_which_artifact_it_takes(expert: Expert) -> None:
    def listed(*quants: str) -> Expert:
        found = [Artifact(Path(quant), "onnx" if quant == "int8" else "gguf", quant, 1, "") for quant in quants]
        return replace(expert, artifacts=tuple(found))

    assert choose_artifact(listed("int8", "f16", "q4_k_m", "q8_0"), None).quant == "q4_k_m"
    assert choose_artifact(listed("f16", "f32"), None).quant == "f16"
    assert choose_artifact(listed("q8_0", "iq4_nl"), "iq4_nl").quant == "iq4_nl"
    with pytest.raises(InvalidRequest, match="int8 and not gguf: build it with --format gguf"):
        choose_artifact(listed("int8"), None)
    with pytest.raises(InvalidRequest, match="leave --format out"):
        gather(expert, Files(), Wish(format="onnx"))


def pack(path: Path, *members: tuple[str, bytes | str]) -> Package:
    """An archive of files, or of links where the content is a string, and the package that it would be."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return Package("@wllama/wllama", digest, {"package/a.js": "wllama/a.js"})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for archives, an empty cache, and no npm."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(FOLDER, str(folder))
    return folder / f"wllama-wllama-{wllama.VERSION}.tgz"


def test_whether_wllama_is_here_is_what_shipping_would_find(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package, of the pinned content; neither a folder that is named nor another file of that kind is enough."""
    package = pack(own, ("package/a.js", b"good"))
    other = replace(package, name="@wllama/wllama-compat", members={})
    content = own.read_bytes()

    def here(*packages: Package) -> bool:
        monkeypatch.setattr(wllama, "PACKAGES", packages)
        return _has_wllama()

    assert here(package)
    assert not here(package, other)
    own.with_name(other.archive).write_bytes(content)
    assert here(package, other)
    own.write_bytes(content + b"x")
    assert not here(package, other)
    cached = Path(os.environ["CUSPRUN_CACHE"]) / "npm" / own.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    assert here(package, other)
    monkeypatch.delenv(FOLDER)
    assert here(package)
    assert not here(package, other)
    cached.write_bytes(b"")
    cached.with_name("wllama-wllama-0.0.1.tgz").write_bytes(content)
    assert not here(package)
    own.write_bytes(content)
    monkeypatch.setenv(FOLDER, str(own.parent / "absent"))
    assert not here(package)


def test_an_archive_of_the_users_own_is_checked_and_kept(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pack(own, ("package/a.js", b"good"), ("package/../../b.js", b"bad"))
    assert fetch_wllama((package,)) == {"wllama/a.js": b"good"}
    own.write_bytes(own.read_bytes() + b"x")
    monkeypatch.delenv(FOLDER)
    assert fetch_wllama((package,)) == {"wllama/a.js": b"good"}  # from the cache, without npm
    cached = Path(os.environ["CUSPRUN_CACHE"]) / "npm" / own.name
    cached.write_bytes(b"damaged")
    monkeypatch.setenv(FOLDER, str(own.parent))
    with pytest.raises(InvalidRequest, match="is not the published @wllama/wllama"):
        fetch_wllama((package,))
    own.unlink()
    with pytest.raises(InvalidRequest, match=r"has no wllama-wllama-.*`npm pack @wllama/wllama@"):
        fetch_wllama((package,))
    monkeypatch.delenv(FOLDER)
    with pytest.raises(InvalidRequest, match=r"npm is not here: install Node.js; or .* name that in CUSPRUN_WLLAMA"):
        fetch_wllama((package,))


def test_members_are_plain_files_of_bounded_size(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failed, match="no plain file"):
        fetch_wllama((pack(own, ("package/a.js", "/etc/passwd")),))
    with pytest.raises(Failed, match=r"has no package/a\.js"):
        fetch_wllama((pack(own, ("package/b.js", b"")),))
    package = pack(own, ("package/a.js", b"0" * 100_000))
    monkeypatch.setattr(wllama, "LARGEST", 10_000)
    with pytest.raises(Failed, match="no plain file of at most"):
        fetch_wllama((package,))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'npm error code E404' >&2; exit 1", "npm could not fetch @wllama/wllama .*: npm error code E404; where"),
        ("exit 0", "is not what was published: its sha512 is another"),
    ],
)
def test_what_npm_does_wrong(own: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    npm = own.parent.parent / "npm"  # in PATH
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.delenv(FOLDER)
    with pytest.raises(Failed, match=message):
        fetch_wllama((Package("@wllama/wllama", "x", {}),))


def test_the_pinned_packages_are_what_npm_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = fetch_wllama()
    assert set(found) == {member for package in wllama.PACKAGES for member in package.members.values()}
    assert found["wllama/wllama.wasm"][:4] == found["wllama/compat.wasm"][:4] == b"\0asm"
    assert f'LIBLLAMA_VERSION = "{wllama.LLAMA_CPP}-'.encode() in found["wllama/wllama.js"]
    assert b"MIT License" in found["LICENSES/wllama.txt"]
