"""Perplexity, bits per byte and KL divergence of an artifact as it ships, by llama-perplexity's window rule.

llama-perplexity (llama.cpp, tools/perplexity): the tokens are cut into windows of ``context`` that do not overlap, what
does not fill a window is left out; a model whose tokenizer adds BOS sees it in place of each window's first token;
position context/2 is the first whose logits are scored, so the second half of a window is predicted with at least half
a window before it.

Where the artifact and the one it is held against have different vocabularies, both are scored over the same bytes
(benchmarks/same_bytes.py): bits per byte compare them, perplexities per token do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cusprun.benchmarks.losses import divergences, losses
from cusprun.benchmarks.same_bytes import Passages, same_passages
from cusprun.benchmarks.tally import REMARK, Quality, QualityPair, Tally
from cusprun.errors import InvalidRequest
from cusprun.progress import say, track
from cusprun.runtimes import Runtime, is_onnx, open_runtime
from cusprun.runtimes.child import run_in_child

Score = Literal["second-half", "all"]
Text = str | Sequence[str]

SEPARATOR = "\n\n"  # between the texts of a corpus


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
    Raises InvalidRequest for a text shorter than one window, Failed where the artifact does not run; a crash of
    llama.cpp is a Failed too.
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
    """:func:`evaluate` on several corpora with one load of each artifact, and the other artifact's own figures.

    Where the vocabularies differ, windows are cut in the tokens of ``against``.
    """
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
    native = any(path is not None and (path.suffix == ".gguf" or is_onnx(path)) for path in (artifact, against))
    found = run_in_child(_measure, **request) if native else _measure(**request)
    return {name: QualityPair.of(pair) for name, pair in found.items()}


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
) -> dict[str, dict[str, Any]]:
    """The work of :func:`evaluate_corpora`, in whichever process; JSON in, JSON out."""
    runtime = open_runtime(Path(artifact), context=context, threads=threads, device=device)
    other = None if against is None else open_runtime(Path(against), context=context, threads=threads, device=device)
    same = other is None or same_vocabulary(runtime, other, corpora.values(), special)
    for opened in (runtime, other) if same else (other,):
        if opened is not None and opened.n_context < context:
            raise InvalidRequest(
                f"{opened.path} holds {opened.n_context} tokens at most: write --context {opened.n_context}"
            )
    cutter = runtime if other is None else other
    cut: dict[str, list[Sequence[int]]] = {}
    for name, text in corpora.items():
        tokens = cutter.encode(text, special=special)
        if cutter.bos is not None:
            tokens = [cutter.bos, *tokens]
        if len(tokens) < (context if score == "second-half" else 2):
            raise InvalidRequest(
                f"the text {name!r} has {len(tokens)} tokens and a window has {context}: give more text or a smaller "
                "--context"
            )
        cut[name] = windows(tokens, context, score, None if max_tokens is None else max_tokens // context)
    first = context // 2 if score == "second-half" else 0
    found: dict[str, QualityPair] = {}
    if other is None or same:
        for name, held in cut.items():
            label = f"{name}: {runtime.path.name}"
            found[name] = score_windows(runtime, other, held, context=context, first=first, label=label)
    else:
        say(REMARK)
        passages = same_passages(runtime, other, cut, first)
        needed = max(passage.own.shown for pairs in passages.values() for passage in pairs)
        if needed > runtime.n_context:
            runtime.close()
            runtime = open_runtime(Path(artifact), context=needed, threads=threads, device=device)
        if needed > runtime.n_context:
            passages = same_passages(runtime, other, cut, first, room=runtime.n_context)
        for name, pairs in passages.items():
            label = f"{name}: {runtime.path.name}"
            found[name] = score_passages(runtime, other, pairs, context=context, label=label)
    runtime.close()
    if other is not None:
        other.close()
    return {name: asdict(pair) for name, pair in found.items()}


def same_vocabulary(one: Runtime, other: Runtime, texts: Iterable[str], special: bool) -> bool:
    """Whether a token id means the same in both: only then do distributions over them compare."""
    return (one.n_vocab, one.bos) == (other.n_vocab, other.bos) and all(
        one.encode(text, special=special) == other.encode(text, special=special) for text in texts
    )


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
    runtime: Runtime, other: Runtime | None, cut: Sequence[Sequence[int]], *, context: int, first: int, label: str
) -> QualityPair:
    """Both artifacts over the same windows, one window's logits at a time, those from position ``first`` on."""
    tally, other_tally = Tally(), Tally()
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
        tally.kld.append(kld)
        tally.same_top += int(same.sum())
    if other is None:
        return QualityPair(tally.quality(context, False), None, nats=tuple(tally.windows))
    return replace(_paired(tally, other_tally, context, same=True), divergence=tally.divergence())


def score_passages(
    runtime: Runtime, other: Runtime, pairs: Sequence[Passages], *, context: int, label: str
) -> QualityPair:
    """Each artifact over its own tokens of the same bytes."""
    tally, other_tally = Tally(), Tally()
    for pair in track(pairs, f"bits per byte of {label}", total=len(pairs)):
        for opened, passage, sums in ((runtime, pair.own, tally), (other, pair.reference, other_tally)):
            targets = np.asarray(passage.tokens[passage.scored :])
            logits = opened.logits(passage.tokens[:-1], start=passage.scored - 1)  # (scored, n_vocab)
            sums.add(losses(logits, targets), pair.n_bytes)
    return _paired(tally, other_tally, context, same=False)


def _paired(own: Tally, other: Tally, context: int, *, same: bool) -> QualityPair:
    return QualityPair(
        own.quality(context, same), other.quality(context, False), same,
        nats=tuple(own.windows), against_nats=tuple(other.windows),
    )  # fmt: skip
