"""A Hugging Face folder run by torch in float32; per-layer layouts through cusprun's own model classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from cusprun.checkpoint import load_model
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Sampling, default_threads
from cusprun.runtimes.folder_tokenizer import FolderTokenizer
from cusprun.runtimes.generation import check_length, check_start, common_prefix, generate_tokens


class TorchRuntime(FolderTokenizer):
    """Runs a model folder with transformers; see :class:`cusprun.runtimes.Runtime` for what each method promises."""

    def __init__(self, path: Path, *, context: int = 2048, threads: int | None = None, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InvalidRequest("device cuda was asked for and torch sees no CUDA device: write cpu")
        super().__init__(path)
        self.name = f"torch {torch.__version__}"
        self.path = path
        self.device = device
        torch.set_num_threads(threads or default_threads())
        self._model = load_model(path).to(device)
        self.n_vocab = int(self._model.config.vocab_size)
        self.n_context = min(context, int(self._model.config.max_position_embeddings))
        self._cache: Any = DynamicCache()
        self._cached: list[int] = []

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
    def cached(self) -> int:
        return int(self._cache.get_seq_length())

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        check_start(start, len(tokens))
        self.forget(common_prefix(self._cached, tokens[:start]))
        return self._append(tokens[len(self._cached) :], len(tokens) - start)

    def prefill(self, tokens: Sequence[int], *, reuse: bool = False) -> np.ndarray:
        check_length(len(tokens), self.n_context)
        self.forget(common_prefix(self._cached, tokens[:-1]) if reuse else 0)
        last: np.ndarray = self._append(tokens[len(self._cached) :], 1)[0]
        return last

    def step(self, token: int) -> np.ndarray:
        check_length(len(self._cached) + 1, self.n_context)
        last: np.ndarray = self._append([token], 1)[0]
        return last

    def forget(self, keep: int) -> None:
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

    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        return generate_tokens(self, tokens, sampling)

    def close(self) -> None:
        self._model = self._cache = None
        self._cached = []
