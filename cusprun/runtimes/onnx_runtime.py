"""An ONNX folder run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime

from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import Sampling, default_threads
from cusprun.runtimes.folder_tokenizer import FolderTokenizer
from cusprun.runtimes.generation import check_length, check_start, common_prefix, generate_tokens
from cusprun.runtimes.onnx_session import OnnxSession

BATCH = 512  # tokens of one call, so that logits of a long text are not all in memory twice


class OnnxRuntime(FolderTokenizer):
    """Runs an ONNX folder; see :class:`cusprun.runtimes.Runtime` for what each method promises."""

    def __init__(self, path: Path, *, context: int = 2048, threads: int | None = None, device: str = "cpu") -> None:
        provider = {"cpu": "CPU", "cuda": "CUDA"}[device]
        if f"{provider}ExecutionProvider" not in onnxruntime.get_available_providers():
            raise InvalidRequest(
                f"device {device} was asked for and this onnxruntime was built without it: write cpu, or install "
                "onnxruntime-gpu in its place"
            )
        super().__init__(path)
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.path = path
        try:
            self._session: OnnxSession | None = OnnxSession(
                path, context=context, threads=threads or default_threads(), provider=provider
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"{path}/genai_config.json does not describe a decoder: {error!r}") from error
        except Exception as error:  # onnxruntime's exceptions have no class in common but this
            raise Failed(f"onnxruntime does not load {path}: {error}") from error
        self.n_vocab = int(self._session.config["vocab_size"])
        self.n_context = self._session.context
        self._cached: list[int] = []

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        assert self._session is not None
        own = self._tokenizer.eos_token_id
        return self._session.end_tokens | ({own} if own is not None else frozenset())

    @property
    def cached(self) -> int:
        assert self._session is not None
        return self._session.filled

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        check_start(start, len(tokens))
        keep = common_prefix(self._cached, tokens[:start])
        self.forget(keep)
        found = np.empty((len(tokens) - start, self.n_vocab), dtype=np.float32)
        done = 0
        for first in range(keep, len(tokens), BATCH):
            piece = tokens[first : first + BATCH]
            rows = min(len(piece), max(0, first + len(piece) - start))
            logits = self._append(piece, max(rows, 1))
            if rows:
                found[done : done + rows] = logits
                done += rows
        return found

    def prefill(self, tokens: Sequence[int], *, reuse: bool = False) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        keep = common_prefix(self._cached, tokens[:-1]) if reuse else 0
        self.forget(keep)
        last: np.ndarray = self._append(tokens[keep:], 1)[0]
        return last

    def step(self, token: int) -> np.ndarray:
        check_length(len(self._cached) + 1, self.n_context)
        last: np.ndarray = self._append([token], 1)[0]
        return last

    def forget(self, keep: int) -> None:
        self._cached = self._cached[:keep]

    def _append(self, tokens: Sequence[int], rows: int) -> np.ndarray:
        """Appends tokens to the cache; logits after the last ``rows`` of them, (rows, n_vocab)."""
        assert self._session is not None
        wrong = [token for token in tokens if not 0 <= token < self.n_vocab]
        if wrong:
            raise InvalidRequest(f"token id {wrong[0]} is outside the vocabulary of {self.n_vocab}")
        self._session.filled = len(self._cached)
        held, self._cached = self._cached, []  # an interrupt in the middle leaves a cache that nothing trusts
        logits = self._session.append(tokens, rows)
        self._cached = [*held, *tokens]
        return logits

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        return generate_tokens(self, tokens, sampling)

    def close(self) -> None:
        self._session = None
        self._cached = []
