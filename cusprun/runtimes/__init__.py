"""One interface over torch and llama.cpp: load an artifact, tokens, logits, generate.

Whoever runs an artifact (proof, eval, bench, chat) asks :func:`open_runtime` and never a runtime directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cusprun.errors import InvalidRequest


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; ``temperature`` 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 0


class Runtime(Protocol):
    """A loaded artifact."""

    name: str  # "torch" or "llama.cpp", with version
    path: Path
    n_vocab: int
    n_context: int

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``. No token is added in front; with ``special`` the text of special tokens counts."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` adds to a text: a byte-level piece undone to its bytes, split UTF-8 kept as it is;
        empty for a control token. Joined over ``encode(text)`` they are ``text`` in UTF-8 (SentencePiece's leading
        space aside)."""
        ...

    @property
    def bos(self) -> int | None:
        """The id that the model's tokenizer puts in front of every text, None where it puts none."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a generation."""
        ...

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Next-token logits after each token, (len(tokens), n_vocab) float32, from an empty cache."""
        ...

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's chat template writes it, ready for the assistant's turn.

        Without a template the contents are joined by blank lines.
        """
        ...

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yields token ids after ``tokens`` until an end token (not yielded) or ``max_tokens``."""
        ...

    def close(self) -> None: ...


def open_runtime(path: Path, *, context: int = 2048, threads: int | None = None, device: str = "cpu") -> Runtime:
    """Loads a model folder (torch) or a .gguf file (llama.cpp).

    ``context`` is the most tokens one call may hold; ``threads`` defaults to the physical cores; ``device`` is
    cpu or cuda. Raises InvalidRequest where the path is neither, Failed where the runtime cannot load it.
    """
    if path.is_dir() and (path / "config.json").is_file():
        from cusprun.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(path, context=context, threads=threads, device=device)
    if path.is_file() and path.suffix == ".gguf":
        from cusprun.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(path, context=context, threads=threads, device=device)
    raise InvalidRequest(f"{path} is neither a model folder (with config.json) nor a .gguf file")
