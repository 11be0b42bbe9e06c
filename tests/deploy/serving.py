"""A real `cusprun-edge serve` in a process of its own, and how tests call it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI

from cusprun.deploy.turns import encode_turns
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes import Message, Runtime, Sampling
from tests.pico import save_model

COMMAND = (sys.executable, "-P", "-m", "cusprun.cli")


@dataclass
class Server:
    """A running server; ``url`` ends in /v1."""

    process: subprocess.Popen[str]
    url: str
    model: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, key: str = "none", **settings: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **settings)

    def post(self, path: str, **fields: Any) -> httpx2.Response:
        """A POST of JSON, with the model's name where none is given."""
        return httpx2.post(f"{self.url}/{path}", json={"model": self.model, **fields}, timeout=60)

    def chat(self, text: str, **fields: Any) -> httpx2.Response:
        return self.post("chat/completions", messages=[{"role": "user", "content": text}], **fields)

    def metric(self, name: str, key: str = "none") -> float:
        """The sum of a metric over its labels."""
        text = httpx2.get(f"{self.root}/metrics", timeout=60, headers={"authorization": f"Bearer {key}"}).text
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(artifact: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server on a free port, ended with the block."""
    process = subprocess.Popen(
        [*COMMAND, "serve", str(artifact), "--port", "0", "--threads", "1", *options],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, f"the server ended with {process.wait()}"
        name = options[options.index("--name") + 1] if "--name" in options else artifact.stem
        yield Server(process, url, name)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def small_gguf(folder: Path, **settings: Any) -> Path:
    """A pico model as a .gguf file; with this seed most questions are answered until the context is full."""
    model = save_model(folder / "model", seed=1, **settings)
    export_gguf(model, folder / "pico.gguf", "q8_0")
    return folder / "pico.gguf"


def said(runtime: Runtime, tokens: Sequence[int], most: int) -> str:
    """What the likeliest tokens spell after ``tokens``, control tokens left out."""
    found = runtime.generate(tokens, Sampling(max_tokens=most))
    return b"".join(runtime.token_bytes(token) for token in found).decode(errors="replace")


def answer_alone(runtime: Runtime, text: str, most: int) -> str:
    return said(runtime, encode_turns(runtime, [Message("user", text)]), most)
