"""Perplexity, bits per byte and KL divergence of an artifact as it ships, by llama-perplexity's window rule.

llama-perplexity (llama.cpp, tools/perplexity): the tokens are cut into windows of ``context`` that do not overlap, what
does not fill a window is left out; a model whose tokenizer adds BOS sees it in place of each window's first token;
position context/2 is the first whose logits are scored, so the second half of a window is predicted with at least half
a window before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cusprun.errors import Failed, InvalidRequest
from cusprun.progress import track
from cusprun.runtimes import Runtime, open_runtime
from cusprun.runtimes.child import run_in_child

Score = Literal["second-half", "all"]
Text = str | Sequence[str]

SEPARATOR = "\n\n"  # between the texts of a corpus
ROWS = 4  # positions per float64 softmax: 4 x 49152 x 8 bytes = 1.5 MB, which a cache holds


@dataclass(frozen=True)
class Quality:
    """What `eval --json` prints. ``kld_mean`` (nats) and ``top1_agreement`` (share) only against another artifact."""

    perplexity: float
    perplexity_stderr: float  # perplexity x standard error of the mean negative log-likelihood
    bits_per_byte: float  # of the scored tokens, over the UTF-8 bytes they stand for
    tokens: int  # scored
    kld_mean: float | None  # mean of KL(against || artifact) over the scored positions
    top1_agreement: float | None
    context: int


@dataclass(frozen=True)
class QualityPair:
    """One corpus measured on an artifact and, where one was given, on the artifact it is held against."""

    artifact: Quality
    against: Quality | None


@dataclass
class Tally:
    """Running sums over scored positions, in nats and bytes."""

    count: int = 0
    nll: float = 0.0
    nll_squared: float = 0.0
    bytes: int = 0
    kld: float = 0.0
    same_top: int = 0

    def add(self, nll: np.ndarray, n_bytes: int) -> None:
        self.count += len(nll)
        self.nll += float(nll.sum())
        self.nll_squared += float((nll * nll).sum())
        self.bytes += n_bytes

    def quality(self, context: int, compared: bool) -> Quality:
        mean = self.nll / self.count
        variance = max(self.nll_squared / self.count - mean * mean, 0.0)
        if mean > 700:  # exp overflows; a working model is far below the log of its vocabulary
            raise Failed(f"the mean loss is {mean:.0f} nats per token: the artifact is broken")
        if self.bytes == 0:
            raise InvalidRequest("the scored tokens are control tokens only: give a text")
        perplexity = math.exp(mean)
        return Quality(
            perplexity=perplexity,
            perplexity_stderr=perplexity * math.sqrt(variance / (self.count - 1)) if self.count > 1 else 0.0,
            bits_per_byte=self.nll / math.log(2) / self.bytes,
            tokens=self.count,
            kld_mean=self.kld / self.count if compared else None,
            top1_agreement=self.same_top / self.count if compared else None,
            context=context,
        )


def evaluate(
    artifact: Path,
    text: Text,
    *,
    against: Path | None = None,
    context: int = 512,
    score: Score = "second-half",
    max_tokens: int | None = None,
    special: bool = False,
    threads: int | None = None,
    device: str = "cpu",
) -> Quality:
    """Quality of a model folder or .gguf file on ``text`` (several texts are joined by a blank line).

    ``score`` "all" takes every token that has one before it in its window, and the last, shorter window too.
    ``max_tokens`` keeps so many, in whole windows at even distances over the text; ``special`` reads <|im_start|> and
    the like as tokens.
    Raises InvalidRequest for a text shorter than one window or vocabularies that differ, Failed where the artifact
    does not run; a crash of llama.cpp is a Failed too.
    """
    return evaluate_corpora(
        artifact,
        {"text": text},
        against=against,
        context=context,
        score=score,
        max_tokens=max_tokens,
        special=special,
        threads=threads,
        device=device,
    )["text"].artifact


def evaluate_corpora(
    artifact: Path,
    corpora: Mapping[str, Text],
    *,
    against: Path | None = None,
    context: int = 512,
    score: Score = "second-half",
    max_tokens: int | None = None,
    special: bool = False,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, QualityPair]:
    """:func:`evaluate` on several corpora with one load of each artifact, and the other artifact's own figures."""
    if context < 4:
        raise InvalidRequest(f"a window of {context} tokens has no second half: write --context 4 or more")
    if score not in ("second-half", "all"):
        raise InvalidRequest(f"score {score!r} is unknown: write second-half or all")
    if max_tokens is not None and max_tokens < context:
        raise InvalidRequest(f"{max_tokens} tokens do not fill a window of {context}: write {context} or more")
    request: dict[str, Any] = {
        "artifact": str(artifact),
        "corpora": {name: join(text) for name, text in corpora.items()},
        "against": None if against is None else str(against),
        "context": context,
        "score": score,
        "max_tokens": max_tokens,
        "special": special,
        "threads": threads,
        "device": device,
    }
    native = any(path is not None and path.suffix == ".gguf" for path in (artifact, against))
    found = run_in_child(_measure, **request) if native else _measure(**request)
    return {
        name: QualityPair(Quality(**own), None if others is None else Quality(**others))
        for name, (own, others) in found.items()
    }


def join(text: Text) -> str:
    """One string of a text or of many."""
    return text if isinstance(text, str) else SEPARATOR.join(text)


def _measure(
    artifact: str,
    corpora: dict[str, str],
    against: str | None,
    context: int,
    score: Score,
    max_tokens: int | None,
    special: bool,
    threads: int | None,
    device: str,
) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """The work of :func:`evaluate_corpora`, in whichever process; JSON in, JSON out."""
    runtime = open_runtime(Path(artifact), context=context, threads=threads, device=device)
    other = None if against is None else open_runtime(Path(against), context=context, threads=threads, device=device)
    for opened in (runtime, other):
        if opened is not None and opened.n_context < context:
            raise InvalidRequest(
                f"{opened.path} holds {opened.n_context} tokens at most: write --context {opened.n_context}"
            )
    found: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {}
    for name, text in corpora.items():
        tokens = runtime.encode(text, special=special)
        if other is not None:
            require_same_vocabulary(runtime, other, text, tokens, special)
        if runtime.bos is not None:
            tokens = [runtime.bos, *tokens]
        if len(tokens) < (context if score == "second-half" else 2):
            raise InvalidRequest(
                f"the text {name!r} has {len(tokens)} tokens and a window has {context}: give more text or a smaller "
                "--context"
            )
        label = f"{name}: {runtime.path.name}"
        cut = windows(tokens, context, score, None if max_tokens is None else max_tokens // context)
        own, others = score_windows(runtime, other, cut, context=context, score=score, label=label)
        found[name] = (asdict(own), None if others is None else asdict(others))
    runtime.close()
    if other is not None:
        other.close()
    return found


def require_same_vocabulary(one: Runtime, other: Runtime, text: str, tokens: list[int], special: bool) -> None:
    """Raises InvalidRequest where a token id does not mean the same in both: then no distribution over them does."""
    if one.n_vocab != other.n_vocab:
        sizes = f"{one.path} has {one.n_vocab} tokens and {other.path} has {other.n_vocab}"
    elif one.bos != other.bos or other.encode(text, special=special) != tokens:
        sizes = f"{one.path} and {other.path} cut the text into different tokens"
    else:
        return
    raise InvalidRequest(f"{sizes}: KL divergence needs equal vocabularies; leave --against out, compare bits per byte")


def windows(tokens: Sequence[int], context: int, score: Score, limit: int | None = None) -> list[Sequence[int]]:
    """Non-overlapping windows of ``context`` tokens, the shorter last one only when every token is scored.

    At most ``limit`` of them, at even distances.
    """
    whole = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    least = context if score == "second-half" else 2
    if len(whole[-1]) < least:
        whole.pop()
    if limit is None or len(whole) <= limit:
        return whole
    return [whole[index * len(whole) // limit] for index in range(limit)]


def score_windows(
    runtime: Runtime, other: Runtime | None, cut: Sequence[Sequence[int]], *, context: int, score: Score, label: str
) -> tuple[Quality, Quality | None]:
    """Both artifacts over the same windows, one window's logits at a time."""
    tally, other_tally = Tally(), Tally()
    first = context // 2 if score == "second-half" else 0
    lengths: dict[int, int] = {}
    for window in track(cut, f"perplexity of {label}", total=len(cut)):
        shown = list(window[:-1])
        if runtime.bos is not None:
            shown[0] = runtime.bos
        targets = np.asarray(window[first + 1 :])
        for token in set(targets.tolist()) - lengths.keys():
            lengths[token] = len(runtime.token_bytes(token))
        n_bytes = sum(lengths[token] for token in targets.tolist())
        logits = runtime.logits(shown, start=first)  # (scored, n_vocab)
        if other is None:
            tally.add(losses(logits, targets), n_bytes)
            continue
        other_logits = other.logits(shown, start=first)
        nll, other_nll, kld, same = divergences(logits, other_logits, targets)
        tally.add(nll, n_bytes)
        other_tally.add(other_nll, n_bytes)
        tally.kld += float(kld.sum())
        tally.same_top += int(same.sum())
    compared = other is not None
    return tally.quality(context, compared), other_tally.quality(context, False) if compared else None


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) per row in float64, (n,); ``logits`` (n, n_vocab), ``targets`` (n,)."""
    found = np.empty(len(targets))
    for part in _parts(len(targets)):
        rows = logits[part].astype(np.float64)
        _, log_sum = _exponentials(rows)
        found[part] = log_sum - rows[np.arange(len(rows)), targets[part]]
    return found


def divergences(
    logits: np.ndarray, reference: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per row: loss, the reference's loss, KL(reference || this) in nats, whether both find one token likeliest.

    With logits z, p = softmax: KL(p || q) = sum p (z_p - z_q) - logsumexp z_p + logsumexp z_q, in float64.
    """
    n = len(targets)
    nll, reference_nll, kld, same = np.empty(n), np.empty(n), np.empty(n), np.empty(n, dtype=bool)
    for part in _parts(n):
        q, p = logits[part].astype(np.float64), reference[part].astype(np.float64)
        at = (np.arange(len(q)), targets[part])
        same[part] = q.argmax(axis=1) == p.argmax(axis=1)
        _, log_sum_q = _exponentials(q)
        weights, log_sum_p = _exponentials(p)
        nll[part], reference_nll[part] = log_sum_q - q[at], log_sum_p - p[at]
        np.subtract(p, q, out=p)
        kld[part] = np.einsum("ij,ij->i", weights, p) / weights.sum(axis=1) - log_sum_p + log_sum_q
    return nll, reference_nll, kld, same


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS))


def _exponentials(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(row - its largest), and ln of the sum of exp(row). Raises Failed where a logit is not a number."""
    largest = rows.max(axis=1, keepdims=True)
    weights = rows - largest
    np.exp(weights, out=weights)
    log_sum: np.ndarray = np.log(weights.sum(axis=1)) + largest[:, 0]
    if not np.isfinite(log_sum).all():
        raise Failed("the artifact's logits are not finite numbers: its weights are damaged")
    return weights, log_sum
