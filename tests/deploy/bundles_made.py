"""Pico experts as a browser bundle wants them, bundles written to folders, and the servers that they are put on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.files import Files
from cusprun.exporters.gguf import export_gguf
from cusprun.files import sha256_file
from tests.exporters.models import make


def make_expert(folder: Path, *, name: str = "pico-en-legal-qa", gguf: Path | None = None, **settings: Any) -> Expert:
    """An expert with widths of its own in every layer, exported to q8_0; or one around a .gguf that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if gguf is None:
        make(model, **{"layout": "per-layer", **settings})
        gguf = folder / "gguf" / "pico-q8_0.gguf"
        export_gguf(model, gguf, "q8_0")
    artifact = Artifact(gguf, "gguf", "q8_0", gguf.stat().st_size, sha256_file(gguf))
    card = {
        "name": name,
        "scenario": {"language": "en", "domain": "legal", "task": "qa"},
        "base": {"id": "pico-llama", "licence": "Apache-2.0"},
    }
    return Expert(folder, name, card, None, model, (artifact,))


def write_files(files: Files, folder: Path) -> Path:
    for name, source in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read())
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """Python's own static server, without its log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def plain_server(folder: Path, port: int = 0) -> Iterator[str]:
    """The address of a static server that knows nothing of isolation."""
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
