"""Serves the folder of a browser bundle to this machine, with the headers that let the page use threads.

A browser shares memory between threads only where the page is cross-origin isolated, which two headers ask for.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.deploy.serve.settings import LOOPBACK_NAMES, host_named
from cusprun.errors import InvalidRequest, MissingPackage
from cusprun.progress import say

if TYPE_CHECKING:
    from starlette.applications import Starlette

ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
ALWAYS = {
    "Cache-Control": "no-store",  # a bundle that was made again is seen at once; the page keeps what it needs itself
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Not left to the machine's own table, which may lack these or have them wrong.
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".gguf": "application/octet-stream",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
}
PAGE = ("index.html", "sw.js", "bundle.json")


def serve_folder(folder: Path, host: str = "127.0.0.1", port: int = 8080, isolated: bool = True) -> None:
    """Serves until it is interrupted; port 0 takes a free one. Its address is told on stderr.

    Raises InvalidRequest where the folder is no browser bundle, the host is not this machine alone, or the port is
    taken; MissingPackage without the extra `serve`.
    """
    app = make_app(folder, isolated, host)
    import uvicorn

    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
    with listening:
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[listening])


def make_app(folder: Path, isolated: bool = True, host: str = "127.0.0.1") -> Starlette:
    """The ASGI application over a bundle's folder: its files and nothing else, no listing, no links.

    It answers by this machine's names and ``host`` alone: a page of another site can have its own name point here (DNS
    rebinding).
    """
    missing = [name for name in PAGE if not (folder / name).is_file()]
    if missing:
        raise InvalidRequest(
            f"{folder} is no browser bundle (it has no {missing[0]}): name the folder that "
            "`cusprun-edge ship EXPERT --target browser` wrote"
        )
    try:
        from starlette.applications import Starlette
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse, Response
        from starlette.routing import Mount
        from starlette.staticfiles import StaticFiles
        from starlette.types import Receive, Scope, Send
    except ImportError as error:
        raise MissingPackage("starlette", "serve", "serving a bundle") from error

    headers = {**ALWAYS, **(ISOLATION if isolated else {})}
    hosts = {*LOOPBACK_NAMES, f"[{host}]" if ":" in host else host}

    class BundleFiles(StaticFiles):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if host_named(Headers(scope=scope).get("host", "")) in hosts:
                await super().__call__(scope, receive, send)
                return
            refusal = "the Host header names another server than this: call 127.0.0.1 or localhost\n"
            await PlainTextResponse(refusal, 403, headers)(scope, receive, send)

        def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
            found, stat = super().lookup_path(path)  # with every link resolved
            linked = os.path.join(str(self.directory), os.path.normpath(path)) != found
            return ("", None) if stat is not None and linked and path not in ("", ".") else (found, stat)

        async def get_response(self, path: str, scope: Scope) -> Response:
            response = await super().get_response(path, scope)
            kind = TYPES.get(Path("index.html" if path in ("", ".") else path).suffix.lower())
            if kind is not None and response.status_code < 300:
                response.headers["Content-Type"] = kind
            response.headers.update(headers)
            return response

    return Starlette(routes=[Mount("/", BundleFiles(directory=folder.resolve(), html=True))])


def _listen(host: str, port: int) -> socket.socket:
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise InvalidRequest(
            f"--host {host}: a bundle is served to this machine alone (127.0.0.1, ::1 or localhost), for browsers give "
            "threads and offline use to https and to localhost only; for others put its files on an https host, as "
            "its README.md says"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # It listens: who comes as soon as the address is told waits for an answer, and is not refused.
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InvalidRequest(f"--port {port} on {host} cannot be had ({reason}): name another") from error
