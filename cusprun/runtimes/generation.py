"""From logits to tokens and from tokens to text that can be shown while it grows; the same for every runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cusprun.errors import InvalidRequest
from cusprun.runtimes import Runtime, Sampling

LONGEST_CHARACTER = 4  # bytes of UTF-8, so at most as many tokens


def draw(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """One token id from ``logits`` (n_vocab,): the likeliest at temperature 0, else nucleus sampling (top-p)."""
    if sampling.temperature <= 0.0:
        return int(np.argmax(logits))
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # at a tiny temperature all but the likeliest come to -inf
        probabilities = np.exp((wide - wide.max()) / sampling.temperature)
    probabilities /= probabilities.sum()
    if sampling.top_p >= 1.0:
        reached = np.cumsum(probabilities)
        return min(int(np.searchsorted(reached, rng.random() * reached[-1], side="right")), len(reached) - 1)
    nucleus = find_nucleus(probabilities, sampling.top_p)
    return int(rng.choice(nucleus, p=probabilities[nucleus] / probabilities[nucleus].sum()))


def find_nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The likeliest ids, (nucleus,), likeliest first: the shortest run whose mass reaches ``top_p``, never empty.

    To sort a whole vocabulary takes as long as half a decode step of a small model, so a few are tried first.
    """
    for few in (256, 4096):
        if few >= len(probabilities):
            break
        best = np.argpartition(-probabilities, few)[:few]
        order = best[np.lexsort((best, -probabilities[best]))]
        at = int(np.searchsorted(np.cumsum(probabilities[order]), top_p))
        if at < few and probabilities[order[at]] > probabilities[order[-1]]:  # no tie across the edge
            return order[: at + 1]
    order = np.argsort(-probabilities, kind="stable")
    return order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]


def generate_tokens(runtime: Runtime, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yields what ``runtime`` says after ``tokens``; what its cache already holds is not computed again."""
    check_length(len(tokens), runtime.n_context)
    rng = np.random.default_rng(sampling.seed)
    end = runtime.end_tokens
    room = min(sampling.max_tokens, runtime.n_context - len(tokens))
    logits = runtime.prefill(tokens, reuse=True)
    for count in range(room):
        token = draw(logits, sampling, rng)
        if token in end:
            return
        yield token
        if count + 1 < room:
            logits = runtime.step(token)


def check_length(tokens: int, context: int) -> None:
    """Raises InvalidRequest unless 1 <= tokens <= context."""
    if tokens == 0:
        raise InvalidRequest("there are no tokens to run the model on: give it some text")
    if tokens > context:
        raise InvalidRequest(f"{tokens} tokens do not fit the context of {context}: shorten the text or open it longer")


def check_start(start: int, tokens: int) -> None:
    """Raises InvalidRequest unless 0 <= start < tokens."""
    if not 0 <= start < tokens:
        raise InvalidRequest(f"logits from position {start} of {tokens} tokens were asked for: 0 to {tokens - 1} exist")


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


class TextStream:
    """Turns tokens into text piece by piece; a character whose bytes are spread over tokens waits for the last one."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tokens: list[int] = []  # tokens of the present piece, after one piece of context
        self._shown = 0  # characters of the decoded tokens that were given out

    def feed(self, token: int) -> str:
        """The text that became complete with ``token``, possibly empty."""
        self._tokens.append(token)
        text = self._runtime.decode(self._tokens)
        if text.endswith("\ufffd") and len(self._tokens) <= LONGEST_CHARACTER + 1:
            return ""
        piece = text[self._shown :]
        # One token stays as context: decoders drop a leading space of the first token they see.
        self._tokens = self._tokens[-1:]
        self._shown = len(self._runtime.decode(self._tokens))
        return piece

    def flush(self) -> str:
        """What is still held back, with U+FFFD for the bytes that never became a character."""
        piece = self._runtime.decode(self._tokens)[self._shown :]
        self._tokens, self._shown = [], 0
        return piece
