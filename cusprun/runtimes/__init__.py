"""One interface over torch, llama.cpp and onnxruntime: load an artifact, tokens, logits, generate.

Whoever runs an artifact (proof, eval, bench, chat) asks :func:`open_runtime` and never a runtime directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cusprun.errors import InvalidRequest

# GNU OpenMP lets a thread that waits for others spin for milliseconds. Where another process wants the same cores,
# llama.cpp's hundreds of barriers a token then cost ten times the work (measured on two busy cores: 2 instead of 25
# tokens/s); a thousand turns, some 50 µs, bridge what a balanced product waits. Read when OpenMP is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

GENAI_CONFIG = "genai_config.json"


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

    name: str  # "torch", "llama.cpp" or "onnxruntime", with version
    path: Path
    n_vocab: int
    n_context: int

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``. No token is added in front; with ``special`` the text of special tokens counts."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        ...

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

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def cached(self) -> int:
        """Tokens that the cache holds, as the runtime itself counts them."""
        ...

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        """Next-token logits after each token from position ``start`` on, (len(tokens) - start, n_vocab) float32.

        The output layer is computed for these positions alone. With ``start`` 0 the cache is emptied first; else the
        tokens before ``start`` are not computed again where the cache already holds them.
        """
        ...

    def prefill(self, tokens: Sequence[int], *, reuse: bool = False) -> np.ndarray:
        """Next-token logits after the last token, (n_vocab,) float32; the cache then holds ``tokens``.

        The output layer is computed for the last token alone, as a prompt is in use. With ``reuse`` the part that
        the cache already holds is not computed again.
        """
        ...

    def forget(self, keep: int) -> None:
        """Leaves the first ``keep`` tokens in the cache, or all where there are fewer."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Appends one token to the cache; next-token logits, (n_vocab,) float32. One decode step."""
        ...

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's chat template writes it, ready for the assistant's turn.

        Without a template the contents are joined by blank lines.
        """
        ...

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yields token ids after ``tokens`` until an end token (not yielded), ``max_tokens`` or a full context."""
        ...

    def close(self) -> None: ...


def is_onnx(path: Path) -> bool:
    """Whether ``path`` is a folder that onnxruntime-genai would open."""
    return path.is_dir() and (path / GENAI_CONFIG).is_file()


def no_artifact(path: Path) -> InvalidRequest:
    """The error for a path that is none of the three."""
    return InvalidRequest(
        f"{path} is no model folder (with config.json), no .gguf file and no ONNX folder (with {GENAI_CONFIG})"
    )


def default_threads() -> int:
    """Physical cores that this process may use: more threads than that slow both runtimes down."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def open_runtime(path: Path, *, context: int = 2048, threads: int | None = None, device: str = "cpu") -> Runtime:
    """Loads a model folder (torch), a .gguf file (llama.cpp) or an ONNX folder (onnxruntime).

    ``context`` is the most tokens one call may hold (cut to what the model was trained for); ``threads`` defaults to
    the physical cores; ``device`` is cpu or cuda. Raises InvalidRequest where the path is neither, Failed where the
    runtime cannot load it.
    """
    if device not in ("cpu", "cuda"):
        raise InvalidRequest(f"device {device!r} is unknown: write cpu or cuda")
    if context < 1:
        raise InvalidRequest(f"a context of {context} tokens holds nothing: write 1 or more")
    if is_onnx(path):
        from cusprun.runtimes.onnx_runtime import OnnxRuntime

        return OnnxRuntime(path, context=context, threads=threads, device=device)
    if path.is_dir() and (path / "config.json").is_file():
        from cusprun.as_llama import as_llama
        from cusprun.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(as_llama(path), context=context, threads=threads, device=device)
    if path.is_file() and path.suffix == ".gguf":
        from cusprun.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(path, context=context, threads=threads, device=device)
    raise no_artifact(path)
