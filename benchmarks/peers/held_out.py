"""One model folder measured for a study: bits per byte beside the dense model's, accuracy on questions.

The dense model's own figures on a text are measured once and kept; only a model with other tokens than the dense one's
is measured beside it, over the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks import quality, tasks
from cusprun.benchmarks.losses import losses
from cusprun.corpora.document import Question
from cusprun.dense import Dense
from cusprun.errors import Failed
from cusprun.files import write_json
from cusprun.runtimes import open_runtime


class Gauge:
    """Measures folders beside one dense model; ``folder`` keeps the dense model's figures."""

    def __init__(
        self, dense: Dense, folder: Path, *, context: int, eval_tokens: int, threads: int | None, device: str
    ) -> None:
        self.dense, self.folder = dense, folder
        self.context, self.eval_tokens = context, eval_tokens
        self.threads, self.device = threads, device

    def texts(self, model: Path, vocabulary: int, texts: Mapping[str, list[str]]) -> dict[str, dict[str, float | None]]:
        """Per text bits per byte of the model and of the dense one over the same bytes, the standard error of their
        ratio, and the tokens scored.
        """
        same = vocabulary == self.dense.anatomy.vocab_size
        found = self._evaluate(model, texts, None if same else self.dense.folder)
        beside = self._dense_pairs(texts) if same else {}
        measured: dict[str, dict[str, float | None]] = {}
        for name, pair in found.items():
            if same:
                pair = replace(pair, against=beside[name].artifact, against_nats=beside[name].nats)
            assert pair.against is not None
            measured[name] = {
                "bits_per_byte": pair.artifact.bits_per_byte,
                "dense": pair.against.bits_per_byte,
                "increase_stderr": pair.increase_stderr,
                "tokens": pair.artifact.tokens,
            }
        return measured

    def dense_texts(self, texts: Mapping[str, list[str]]) -> dict[str, float]:
        """Bits per byte of the dense model on each text."""
        return {name: pair.artifact.bits_per_byte for name, pair in self._dense_pairs(texts).items()}

    def _dense_pairs(self, texts: Mapping[str, list[str]]) -> dict[str, quality.QualityPair]:
        def measure() -> dict[str, Any]:
            return {name: asdict(pair) for name, pair in self._evaluate(self.dense.folder, texts, None).items()}

        kept = self._once(f"texts by window {_hash_texts(texts)} {self.eval_tokens}", measure)
        return {name: quality.QualityPair.of(pair) for name, pair in kept.items()}

    def _evaluate(
        self, model: Path, texts: Mapping[str, list[str]], against: Path | None
    ) -> dict[str, quality.QualityPair]:
        return quality.evaluate_corpora(
            model, texts, against=against, context=self.context, max_tokens=self.eval_tokens, special=True,
            threads=self.threads, device=self.device,
        )  # fmt: skip

    def windows(self, model: Path, windows: np.ndarray) -> dict[str, float]:
        """Bits per byte and next-token accuracy over the second halves of token windows, (n, window); the vocabulary
        has to be the dense one's. The same of the dense model under ``dense`` and ``dense_accuracy``.
        """
        own = score_windows(model, windows, self.threads, self.device)
        name = f"windows {hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()} {windows.shape}"
        dense = self._once(name, lambda: score_windows(self.dense.folder, windows, self.threads, self.device))
        return {**own, "dense": dense["bits_per_byte"], "dense_accuracy": dense["accuracy"]}

    def questions(self, model: Path, asked: list[Question], most: int) -> dict[str, Any] | None:
        """Multiple choice of the model and of the dense one on the same questions; None where there is none."""
        if not asked or not most:
            return None
        own = self._choose(model, asked, most)
        name = f"questions {hashlib.sha256(repr(asked).encode()).hexdigest()} {most}"
        return {**own, "dense": self._once(name, lambda: self._choose(self.dense.folder, asked, most))}

    def _choose(self, model: Path, asked: list[Question], most: int) -> dict[str, Any]:
        found = tasks.multiple_choice(model, asked, limit=most, threads=self.threads, device=self.device)
        return {
            "accuracy": found.accuracy, "interval": list(found.interval), "n": found.n,
            "constant_answer": found.constant_answer_accuracy,
        }  # fmt: skip

    def _once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` gives for the dense model, or what is kept of an earlier time."""
        import json

        key = hashlib.sha256(f"{self.dense.key} {self.context} {name}".encode()).hexdigest()
        path = self.folder / f"{key[:24]}.json"
        if not path.is_file():
            write_json(path, measure())
        return json.loads(path.read_text(encoding="utf-8"))


def score_windows(model: Path, windows: np.ndarray, threads: int | None, device: str) -> dict[str, float]:
    """Bits per byte and next-token accuracy of a model folder over the second half of each window, (n, window)."""
    runtime = open_runtime(model, context=windows.shape[1], threads=threads, device=device)
    first = windows.shape[1] // 2
    nll = right = count = n_bytes = 0.0
    for window in windows.tolist():
        logits, targets = runtime.logits(window[:-1], start=first), np.asarray(window[first + 1 :])
        nll += float(losses(logits, targets).sum())
        right += float((logits.argmax(axis=1) == targets).sum())
        count += len(targets)
        n_bytes += sum(len(runtime.token_bytes(token)) for token in targets.tolist())
    runtime.close()
    if not n_bytes:
        raise Failed(f"{model}: the windows hold control tokens only")
    return {"bits_per_byte": nll / math.log(2) / n_bytes, "accuracy": right / count, "tokens": count}


def _hash_texts(texts: Mapping[str, list[str]]) -> str:
    digest = hashlib.sha256()
    for name, documents in sorted(texts.items()):
        digest.update(f"{name}\0{len(documents)}\0".encode())
        digest.update("\0".join(documents).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
