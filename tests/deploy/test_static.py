"""The server of a browser bundle: its files with the right types and headers, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cusprun.deploy.static import _listen, make_app, serve_folder
from cusprun.errors import InvalidRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    (bundle / "wllama").mkdir(parents=True)
    for name in ("index.html", "sw.js", "bundle.json", "wllama/wllama.wasm", "icon.svg", "a b.gguf", "style.css"):
        (bundle / name).write_text(name)
    (bundle / "manifest.webmanifest").write_text("{}")
    (tmp_path / "secret.txt").write_text("secret")
    (bundle / "link.txt").symlink_to(tmp_path / "secret.txt")
    (bundle / "inner.js").symlink_to(bundle / "sw.js")
    (bundle / "linked").symlink_to(tmp_path)
    return bundle


@pytest.fixture
def address(folder: Path) -> Iterator[tuple[str, int]]:
    """The application behind a real socket: clients tidy paths up, so requests are written by hand."""
    import threading

    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(folder), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join()
    listening.close()


def ask(
    address: tuple[str, int], path: str, method: str = "GET", host: str = "localhost"
) -> tuple[int, dict[str, str], bytes]:
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
    head, _, body = reply.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


def test_types_and_headers(address: tuple[str, int]) -> None:
    kinds = {
        "/": "text/html; charset=utf-8",
        "/sw.js": "text/javascript; charset=utf-8",
        "/wllama/wllama.wasm": "application/wasm",
        "/a%20b.gguf": "application/octet-stream",
        "/icon.svg": "image/svg+xml",
        "/bundle.json": "application/json",
        "/manifest.webmanifest": "application/manifest+json",
        "/style.css": "text/css; charset=utf-8",
    }
    for path, kind in kinds.items():
        status, headers, _ = ask(address, path)
        assert (status, headers["content-type"]) == (200, kind)
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert ask(address, "/sw.js", "HEAD")[2] == b""
    assert ask(address, "/sw.js", "POST")[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "/wllama/../../secret.txt",
        "/wllama/..%5c..%5csecret.txt",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/link.txt",
        "/inner.js",
        "/linked/secret.txt",
        "/linked/",
        "/wllama/",
        "/wllama",
        "/nothing",
        "/%00",
        "/" + "a" * 5000,
    ],
)
def test_nothing_else_comes_out(address: tuple[str, int], path: str) -> None:
    status, _, body = ask(address, path)
    assert status == 404
    assert b"secret" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080"])
def test_names_of_this_machine(address: tuple[str, int], host: str) -> None:
    assert ask(address, "/", host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.2", "[::2]", ""]
)
def test_a_name_of_another_server_reads_nothing(address: tuple[str, int], host: str) -> None:
    """DNS rebinding: a page of that name asks here."""
    for path in ("/", "/bundle.json", "/a%20b.gguf", "/nothing"):
        status, headers, body = ask(address, path, host=host)
        assert (status, body[:15]) == (403, b"the Host header")
        assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(("host", "name"), [("127.0.0.2", "127.0.0.2"), ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]")])
def test_another_address_of_this_machine_is_a_name_where_it_was_asked_for(folder: Path, host: str, name: str) -> None:
    from starlette.testclient import TestClient

    for asked, status in ((host, 200), ("127.0.0.1", 403)):
        assert TestClient(make_app(folder, host=asked), f"http://{name}:8080").get("/").status_code == status


def test_without_isolation(folder: Path) -> None:
    from starlette.testclient import TestClient

    reply = TestClient(make_app(folder, isolated=False), "http://localhost").get("/")
    assert reply.status_code == 200
    assert not any(name.startswith("cross-origin") for name in reply.headers)


def test_what_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no browser bundle .it has no index.html"):
        serve_folder(tmp_path / "none")
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(InvalidRequest, match="served to this machine alone"):
            serve_folder(folder, host, 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InvalidRequest, match=r"cannot be had .Address already in use.: name another"),
    ):
        serve_folder(folder, port=taken.getsockname()[1])
    os.remove(folder / "bundle.json")
    with pytest.raises(InvalidRequest, match=r"it has no bundle\.json"):
        make_app(folder)


def test_the_port_is_open_before_its_address_is_told() -> None:
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=5):
        pass
