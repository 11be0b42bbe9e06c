"""Opens the port and the model, serves, and ends in order: refuse, let running answers end, close."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from cusprun.deploy.chat import find_artifact
from cusprun.deploy.serve.app import Api
from cusprun.deploy.serve.engine import Engine
from cusprun.deploy.serve.metrics import Metrics
from cusprun.deploy.serve.replies import Model
from cusprun.deploy.serve.settings import Settings
from cusprun.deploy.turns import Tokenizer, encode_turns
from cusprun.errors import InvalidRequest
from cusprun.progress import say
from cusprun.runtimes import Message, Runtime, default_threads, open_runtime

CLOSING_SECONDS = 5  # for what was said last to reach slow clients
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(path: Path, settings: Settings) -> None:
    """Serves ``path`` until SIGINT or SIGTERM; the address goes to stdout once it answers."""
    artifact = find_artifact(path)
    with _bind(settings.host, settings.port) as sock:
        threads = max(1, (settings.threads or default_threads()) // settings.parallel)
        runtimes = [open_runtime(artifact, context=settings.context, threads=threads) for _ in range(settings.parallel)]
        _try_out(runtimes[0])
        first = runtimes[0]
        model = Model(
            id=settings.name or _name(path, artifact),
            created=int(artifact.stat().st_mtime),
            owned_by="cusprun",
            context_window=first.n_context,
            max_output_tokens=min(settings.max_tokens, first.n_context),
        )
        metrics = Metrics(model.id, first.name, first.n_context)
        engine = Engine(runtimes, settings.queue, metrics)
        api = Api(settings, engine, _tokenizer(first), model, first.n_vocab, metrics)
        try:
            _Server(api, engine, settings, sock, model.id).run_until_stopped()
        finally:
            engine.close()
            api.close()


class _Server(uvicorn.Server):
    """uvicorn with another end: its own signal handling gives running answers no time limit that fits them."""

    def __init__(self, api: Api, engine: Engine, settings: Settings, sock: socket.socket, model: str) -> None:
        super().__init__(
            uvicorn.Config(
                api.app(), loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, timeout_keep_alive=30, reset_contextvars=True,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )  # fmt: skip
        self._api, self._engine, self._settings = api, engine, settings
        self._sock, self._model = sock, model
        self._end: asyncio.Task[None] | None = None

    def run_until_stopped(self) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves
        asyncio.run(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        before = {one: signal.signal(one, lambda number, _: self._on_signal(number, loop)) for one in SIGNALS}
        try:
            serving = asyncio.create_task(self.serve([self._sock]))
            while not self.started and not serving.done():
                await asyncio.sleep(0.01)
            if self.started:
                self._announce()
            await serving
        finally:
            self._engine.drop_all()  # nothing is delivered to a loop that is closed
            for number, handler in before.items():
                signal.signal(number, handler)

    def _announce(self) -> None:
        address = address_of(self._sock)
        say(f"{self._model} at {address}/v1; Ctrl-C ends it")
        print(f"{address}/v1", flush=True)

    def _on_signal(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        if self._api.stopping:
            sys.stderr.flush()
            os._exit(128 + number)  # asked twice: now, whatever still runs
        self._api.stopping = True
        loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._end = asyncio.create_task(self._let_answers_end())

    async def _let_answers_end(self) -> None:
        self._engine.stop()
        if self._engine.running:
            say(f"stopping: {self._engine.running + self._engine.waiting} answers are left, again to end at once")
        end = time.monotonic() + self._settings.grace
        while (self._engine.running or self._engine.waiting) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self._engine.drop_all()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def address_of(sock: socket.socket) -> str:
    """http://host:port of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; who connects before the model is loaded waits. Raises InvalidRequest."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InvalidRequest(f"--host {host} is no address of this machine: {error}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise InvalidRequest(
                f"port {port} of {host} is taken: write another after --port, or 0 for a free one"
            ) from error
        raise InvalidRequest(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error
    return sock


def _name(path: Path, artifact: Path) -> str:
    """The expert's name, else the file's or the folder's."""
    card = path / "expert.json"
    if path.is_dir() and card.is_file():
        name = json.loads(card.read_text(encoding="utf-8")).get("name")
        if isinstance(name, str) and name:
            return name
    return artifact.stem if artifact.suffix == ".gguf" else artifact.resolve().name


def _try_out(runtime: Runtime) -> None:
    """One conversation before the first request comes: a template that takes none is the model's fault, said here."""
    runtime.prefill(encode_turns(runtime, [Message("user", "Hello")])[-runtime.n_context :])
    runtime.forget(0)


def _tokenizer(runtime: Runtime) -> Tokenizer:
    """What requests are encoded with while the model's thread runs: llama.cpp's vocabulary may be read by many threads,
    a folder's tokenizer may not, so that it is opened once more."""
    from cusprun.runtimes.folder_tokenizer import FolderTokenizer

    found: Any = FolderTokenizer(runtime.path) if isinstance(runtime, FolderTokenizer) else runtime
    return found
