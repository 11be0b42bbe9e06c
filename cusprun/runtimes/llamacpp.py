"""A .gguf file run by llama.cpp, through the low-level calls of llama-cpp-python.

The header is checked before llama.cpp sees the file; what llama.cpp logs is kept and shown only when something fails.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import finalize

import llama_cpp
import numpy as np

from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import Message, Sampling, default_threads
from cusprun.runtimes.chat_template import join_turns, render_chat
from cusprun.runtimes.generation import check_length, check_start, common_prefix, generate_tokens
from cusprun.runtimes.gguf_header import GgufInfo, load_metadata

__all__ = ["GgufInfo", "LlamaCppRuntime", "load_metadata", "logged"]

BATCH = 512  # tokens per call of llama_decode, llama.cpp's own ubatch
GGML_TYPE_F32 = 0
FLASH_ATTENTION_OFF = 0

_log: deque[str] = deque(maxlen=50)


@llama_cpp.llama_log_callback
def _keep_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level in (3, 4):  # ggml: 2 info, 3 warning, 4 error
        _log.append(text.decode("utf-8", errors="replace").strip())


def quiet() -> None:
    """Sends llama.cpp's log to memory instead of stderr."""
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    _log.clear()
    llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))


def built_with_amx() -> bool:
    """Whether llama.cpp would multiply quantized matrices with AMX tiles.

    GCC 12 takes _tile_loadconfig to read 8 bytes and drops the stores of the other 56, so that a llama.cpp built with
    it dies at the first quantized product (https://github.com/ggml-org/llama.cpp/issues/20824). Which compiler built
    the library cannot be seen from here, hence such a build runs its AVX-512 kernels instead.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


def logged() -> str:
    """The last warnings and errors of llama.cpp, one line."""
    return "; ".join(line for line in _log if line) or "llama.cpp gave no reason"


class LlamaCppRuntime:
    """Runs a .gguf file; see :class:`cusprun.runtimes.Runtime` for what each method promises.

    ``exact`` computes attention in float32 (f32 cache, no flash attention, whose CPU kernel rounds to f16): slower,
    and what a file must be compared with torch by. Without it everything is as llama.cpp ships.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 2048,
        threads: int | None = None,
        device: str = "cpu",
        exact: bool = False,
    ) -> None:
        self._owned = ExitStack()
        finalize(self, self._owned.close)
        self._context: Any = None
        self._batch: Any = None
        self._vocab: Any = None
        self.info = load_metadata(path)
        if device == "cuda" and not llama_cpp.llama_supports_gpu_offload():
            raise InvalidRequest("device cuda was asked for and this llama-cpp-python was built for the CPU: write cpu")
        self.name = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        self.path = path
        self.n_vocab = self.info.vocab_size
        self.n_context = min(context, self.info.context_length)
        self._n_batch = min(BATCH, self.n_context)
        self._cached: list[int] = []
        quiet()
        llama_cpp.llama_backend_init()
        self._open(device, threads or default_threads(), exact)

    def _open(self, device: str, threads: int, exact: bool) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = -1 if device == "cuda" else 0
        parameters.use_extra_bufts = not built_with_amx()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model:
            raise Failed(f"llama.cpp does not load {self.path}: {logged()}")
        self._owned.callback(llama_cpp.llama_model_free, model)
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        n_tokens = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if n_tokens != self.n_vocab:
            raise Failed(f"{self.path} has {n_tokens} tokens and {self.n_vocab} rows in token_embd.weight")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = self.n_context
        settings.n_batch = settings.n_ubatch = self._n_batch
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = GGML_TYPE_F32
            settings.flash_attn_type = FLASH_ATTENTION_OFF
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise Failed(f"llama.cpp opens no context of {self.n_context} tokens for {self.path}: {logged()}")
        self._owned.callback(llama_cpp.llama_free, self._context)
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        self._owned.callback(llama_cpp.llama_batch_free, self._batch)
        for index in range(self._n_batch):
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        raw = text.encode("utf-8", errors="replace")
        room = len(raw) + 8
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), buffer, room, False, special)
        if count < 0:
            room = -count
            buffer = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), buffer, room, False, special)
        if count < 0:
            raise Failed(f"llama.cpp does not tokenize a text of {len(raw)} bytes: {logged()}")
        return list(buffer[:count])

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self._piece(token, special=True) for token in tokens).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return self._piece(token, special=False)

    def _piece(self, token: int, *, special: bool) -> bytes:
        self._check_token(token)
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise InvalidRequest(f"token id {token} is outside the vocabulary of {self.n_vocab}")

    @cached_property
    def bos(self) -> int | None:
        if not llama_cpp.llama_vocab_get_add_bos(self._vocab):
            return None
        first = int(llama_cpp.llama_vocab_bos(self._vocab))
        return first if first >= 0 else None

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(t for t in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(self._vocab, t))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.info.metadata.get("tokenizer.chat_template"))

    @property
    def cached(self) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._context), 0)) + 1

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        check_start(start, len(tokens))
        keep = common_prefix(self._cached, tokens[:start])
        self.forget(keep)
        found = np.empty((len(tokens) - start, self.n_vocab), dtype=np.float32)
        done = 0
        for first in range(keep, len(tokens), self._n_batch):
            piece = tokens[first : first + self._n_batch]
            rows = min(len(piece), max(0, first + len(piece) - start))
            self._decode(piece, rows)
            if rows:
                values = llama_cpp.llama_get_logits(self._context)
                found[done : done + rows] = np.ctypeslib.as_array(values, (rows, self.n_vocab))
                done += rows
        return found

    def prefill(self, tokens: Sequence[int], *, reuse: bool = False) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        keep = common_prefix(self._cached, tokens[:-1]) if reuse else 0
        self.forget(keep)
        for first in range(keep, len(tokens), self._n_batch):
            piece = tokens[first : first + self._n_batch]
            self._decode(piece, int(first + len(piece) == len(tokens)))
        return self._last()

    def step(self, token: int) -> np.ndarray:
        check_length(len(self._cached) + 1, self.n_context)
        self._decode([token], 1)
        return self._last()

    def _last(self) -> np.ndarray:
        row = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self.n_vocab,)).copy()

    def forget(self, keep: int) -> None:
        """Leaves the first ``keep`` tokens in the cache."""
        memory = llama_cpp.llama_get_memory(self._context)
        if keep == 0:
            llama_cpp.llama_memory_clear(memory, True)
        elif not llama_cpp.llama_memory_seq_rm(memory, 0, keep, -1):
            raise Failed(f"llama.cpp does not shorten the cache of {self.path}: {logged()}")
        self._cached = self._cached[:keep]

    def _decode(self, tokens: Sequence[int], rows: int) -> None:
        """Appends at most one batch to the cache; logits for its last ``rows`` tokens."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            self._check_token(token)
            batch.token[index] = token
            batch.pos[index] = len(self._cached) + index
            batch.logits[index] = index >= len(tokens) - rows
        held, self._cached = self._cached, []  # an interrupt in the middle leaves a cache that nothing trusts
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise Failed(f"llama.cpp does not run {self.path} on {len(tokens)} tokens (code {code}): {logged()}")
        self._cached = [*held, *tokens]

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        template = self.info.metadata.get("tokenizer.chat_template")
        if not template:
            return join_turns(messages)
        metadata = self.info.metadata
        bos, eos = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
        text = [self.decode([token]) if isinstance(token, int) else "" for token in (bos, eos)]
        return render_chat(template, messages, bos=text[0], eos=text[1])

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        return generate_tokens(self, tokens, sampling)

    def close(self) -> None:
        """Frees the model; calling it twice is fine, calling anything else afterwards is not."""
        self._owned.close()
