"""A Hugging Face folder run by torch in float32; per-layer layouts through cusprun's own model classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cusprun.checkpoint import load_model, load_tokenizer
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Message, Sampling, default_threads
from cusprun.runtimes.chat_template import join_turns
from cusprun.runtimes.generation import check_length, check_start, common_prefix, generate_tokens


class TorchRuntime:
    """Runs a model folder with transformers; see :class:`cusprun.runtimes.Runtime` for what each method promises."""

    def __init__(self, path: Path, *, context: int = 2048, threads: int | None = None, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InvalidRequest("device cuda was asked for and torch sees no CUDA device: write cpu")
        self.name = f"torch {torch.__version__}"
        self.path = path
        self.device = device
        torch.set_num_threads(threads or default_threads())
        self._model = load_model(path).to(device)
        self._tokenizer = load_tokenizer(path)
        self.n_vocab = int(self._model.config.vocab_size)
        self.n_context = min(context, int(self._model.config.max_position_embeddings))
        self._cache: Any = DynamicCache()
        self._cached: list[int] = []

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))

    def decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def token_bytes(self, token: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token)
        if added is not None:
            return b"" if added.special else str(added.content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row that pads the embedding
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """Character to byte where the tokenizer writes bytes as printable characters (byte-level BPE), else None."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        if "ByteLevel" not in json.dumps([state["decoder"], state["pre_tokenizer"]]):
            return None
        return {character: byte for byte, character in bytes_to_unicode().items()}

    @cached_property
    def bos(self) -> int | None:
        with_special = self._tokenizer.encode("a")
        first = self._tokenizer.bos_token_id
        return int(first) if first is not None and with_special[:1] == [first] else None

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        found: set[int] = set()
        for value in (
            self._tokenizer.eos_token_id,
            self._model.config.eos_token_id,
            self._model.generation_config.eos_token_id,
        ):
            found.update(value if isinstance(value, list) else [] if value is None else [value])
        return frozenset(found)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        check_start(start, len(tokens))
        self._forget(common_prefix(self._cached, tokens[:start]))
        return self._append(tokens[len(self._cached) :], len(tokens) - start)

    def prefill(self, tokens: Sequence[int], *, reuse: bool = False) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        self._forget(common_prefix(self._cached, tokens[:-1]) if reuse else 0)
        last: np.ndarray = self._append(tokens[len(self._cached) :], 1)[0]
        return last

    def step(self, token: int) -> np.ndarray:
        check_length(len(self._cached) + 1, self.n_context)
        last: np.ndarray = self._append([token], 1)[0]
        return last

    def _forget(self, keep: int) -> None:
        """Leaves the first ``keep`` tokens in the cache."""
        if keep == 0:
            self._cache = DynamicCache()
        elif keep < len(self._cached):
            self._cache.crop(keep - len(self._cached))
        self._cached = self._cached[:keep]

    @torch.inference_mode()
    def _append(self, tokens: Sequence[int], rows: int) -> np.ndarray:
        """Appends tokens to the cache; logits after the last ``rows`` of them, (rows, n_vocab)."""
        wrong = [token for token in tokens if not 0 <= token < self.n_vocab]
        if wrong:
            raise InvalidRequest(f"token id {wrong[0]} is outside the vocabulary of {self.n_vocab}")
        held, self._cached = self._cached, []  # an interrupt in the middle leaves a cache that nothing trusts
        output = self._model(self._ids(tokens), past_key_values=self._cache, use_cache=True, logits_to_keep=rows)
        self._cached = [*held, *tokens]
        found: np.ndarray = output.logits[0].float().cpu().numpy()
        return found

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], dtype=torch.long, device=self.device)

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        if not self.has_chat_template:
            return join_turns(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        return generate_tokens(self, tokens, sampling)

    def close(self) -> None:
        self._model = self._cache = None
        self._cached = []
