"""What an artifact answers to requests: likelihoods of given texts, and texts of its own, kept in the answer store.

A request is a JSON object with ``kind``:

- choices {prompt, choices}: ln p of every choice as the assistant's turn; a list of nats
- reply {prompt, until, max_new_tokens}: the likeliest continuation of the user's turn; a text
- loglikelihood {context, continuation}: as lm-evaluation-harness asks it; [nats, whether each token is the likeliest]
- rolling {text, prefix, window}: ln p of a text in the harness's windows; nats
- generate {prompt, until, max_new_tokens, temperature, top_p, seed}: a raw prompt's continuation; a text
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cusprun.benchmarks.answer_store import AnswerStore, answer_keys, store_path
from cusprun.benchmarks.losses import losses
from cusprun.errors import InvalidRequest
from cusprun.progress import say, track
from cusprun.runtimes import Message, Runtime, Sampling, is_onnx, open_runtime
from cusprun.runtimes.child import run_in_child

CONTEXT = 2048  # tokens an artifact is opened for; for more where a request takes more
REPLY_ENDS = "\n\n"  # of a model without a chat template, which has no other way to end


class Prepared(NamedTuple):
    """A request in tokens: sequences of which those from ``start`` on are scored, or one to be continued."""

    number: int  # of the request among those that are asked
    sequences: list[tuple[list[int], int]]
    room: int  # tokens that the context has to hold


def ask(
    artifact: Path,
    requests: Sequence[dict[str, Any]],
    *,
    fresh: bool = False,
    threads: int | None = None,
    device: str = "cpu",
) -> list[Any]:
    """The answers to all requests, in order; those that the store has are not asked again unless ``fresh``.

    A .gguf and an ONNX folder run in a process of their own: a crash of theirs is a Failed, and what was answered by
    then is kept. Raises InvalidRequest for a request that the artifact's context does not hold.
    """
    keys = answer_keys(artifact, requests, device)
    path = store_path()
    with AnswerStore(path) as store:
        if fresh:
            store.forget(keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if store.get(key) is None}
    if missing:
        if len(missing) < len(set(keys)):
            say(
                f"{artifact.name}: {len(set(keys)) - len(missing)} answers kept from before, {len(missing)} to be asked"
            )
        call: dict[str, Any] = {
            "artifact": str(artifact),
            "requests": list(missing.values()),
            "keys": list(missing),
            "store": str(path),
            "threads": threads,
            "device": device,
        }
        if artifact.suffix == ".gguf" or is_onnx(artifact):
            run_in_child(answer_all, **call)
        else:
            answer_all(**call)
    with AnswerStore(path) as store:
        return [store.get(key) for key in keys]


def answer_all(
    artifact: str, requests: list[dict[str, Any]], keys: list[str], store: str, threads: int | None, device: str
) -> None:
    """The work of :func:`ask`, in whichever process: every answer goes to the store as soon as it is there.

    Requests that begin alike follow each other, so that the runtime computes what they share once.
    """
    runtime = open_runtime(Path(artifact), context=CONTEXT, threads=threads, device=device)
    prepared = [prepare(runtime, request, number) for number, request in enumerate(requests)]
    needed = max(item.room for item in prepared)
    if needed > runtime.n_context:
        runtime.close()
        runtime = open_runtime(Path(artifact), context=needed, threads=threads, device=device)
    prepared.sort(key=lambda item: item.sequences[0][0] if item.sequences else [])
    with AnswerStore(Path(store)) as kept:
        for item in track(prepared, f"answers: {runtime.path.name}", total=len(prepared)):
            kept.put(keys[item.number], answer(runtime, requests[item.number], item))
    runtime.close()


def prepare(runtime: Runtime, request: dict[str, Any], number: int) -> Prepared:
    """A request in the artifact's tokens."""
    kind = request["kind"]
    if kind == "choices":
        found = tokenized(runtime, request["prompt"], request["choices"])
        return Prepared(number, found, max(len(tokens) - 1 for tokens, _ in found))
    if kind == "loglikelihood":
        tokens, start = encode_pair(runtime, request["context"], request["continuation"], request["prefix"])
        return Prepared(number, [(tokens, start)], len(tokens) - 1)
    if kind == "rolling":
        windows = rolling_windows(with_bos(runtime, request["text"]), request["prefix"], request["window"])
        return Prepared(number, windows, max((len(tokens) - 1 for tokens, _ in windows), default=1))
    text = request["prompt"]
    if kind == "reply" and runtime.has_chat_template:
        text = runtime.chat_prompt([Message("user", text)])
    tokens = with_bos(runtime, text)
    return Prepared(number, [(tokens, len(tokens))], len(tokens) + int(request["max_new_tokens"]))


def answer(runtime: Runtime, request: dict[str, Any], item: Prepared) -> Any:
    """The answer to one request."""
    kind = request["kind"]
    if kind == "choices":
        return [likelihood(runtime, tokens, start) for tokens, start in item.sequences]
    if kind == "loglikelihood":
        return list(scored(runtime, *item.sequences[0]))
    if kind == "rolling":
        return sum(scored(runtime, tokens, start)[0] for tokens, start in item.sequences)
    tokens = item.sequences[0][0]
    new = int(request["max_new_tokens"])
    until = list(request["until"])
    if kind == "generate":  # the harness cuts what does not fit from the left
        if new >= runtime.n_context:
            raise InvalidRequest(f"{new} new tokens leave no room for a prompt in a context of {runtime.n_context}")
        tokens = tokens[-(runtime.n_context - new) :]
        sampling = Sampling(request["temperature"], request["top_p"], new, request["seed"])
        return generated(runtime, tokens, sampling, until)
    if len(tokens) + new > runtime.n_context:
        raise InvalidRequest(
            f"a prompt of {len(tokens)} tokens and {new} new ones do not fit {runtime.path.name}'s context of "
            f"{runtime.n_context}: shorten the prompt that begins {request['prompt'][:40]!r} or lower --max-new-tokens"
        )
    if not runtime.has_chat_template:
        until.append(REPLY_ENDS)
    return generated(runtime, tokens, Sampling(max_tokens=new), until).strip()


def tokenized(runtime: Runtime, prompt: str, choices: Sequence[str]) -> list[tuple[list[int], int]]:
    """For every choice the tokens of prompt and choice, and where the choice begins.

    Both are cut into tokens as one text: where the last token of the prompt grows into the choice, the choice begins
    with that token.
    """
    if runtime.has_chat_template:
        text, separator = runtime.chat_prompt([Message("user", prompt)]), ""
    else:
        text, separator = prompt, " "
    lead = [] if runtime.bos is None else [runtime.bos]
    alone = runtime.encode(text, special=True)
    if alone[:1] == lead:
        lead = []
    found = []
    for choice in choices:
        whole = runtime.encode(text + separator + choice, special=True)
        start = 0
        while start < min(len(alone), len(whole) - 1) and alone[start] == whole[start]:
            start += 1
        found.append((lead + whole, len(lead) + start))
    return found


def likelihood(runtime: Runtime, tokens: list[int], start: int) -> float:
    """Sum of ln p of the tokens from ``start`` on, in nats."""
    if start == 0:
        raise InvalidRequest("an empty prompt gives the first token nothing to be predicted from: write a prompt")
    logits = runtime.logits(tokens[:-1], start=start - 1)  # (len(tokens) - start, n_vocab)
    return -float(losses(logits, np.asarray(tokens[start:])).sum())


def generated(runtime: Runtime, tokens: list[int], sampling: Sampling, until: Sequence[str]) -> str:
    """The text after ``tokens`` up to the first of the ``until`` texts, without control tokens."""
    said: list[int] = []
    text = ""
    for token in runtime.generate(tokens, sampling):
        if runtime.token_bytes(token):
            said.append(token)
        text = runtime.decode(said)
        if any(end and end in text for end in until):
            break
    for end in until:
        text = text.split(end)[0] if end else text
    return text


def scored(runtime: Runtime, tokens: list[int], start: int) -> tuple[float, bool]:
    """Sum of ln p of the tokens from ``start`` on, and whether each is the likeliest; the left is dropped to fit."""
    dropped = max(0, len(tokens) - (runtime.n_context + 1))
    if dropped >= start:
        raise InvalidRequest(
            f"{len(tokens) - start} tokens are to be scored at once and {runtime.path.name} holds {runtime.n_context}"
        )
    tokens, start = tokens[dropped:], start - dropped
    targets = np.asarray(tokens[start:])
    logits = runtime.logits(tokens[:-1], start=start - 1)  # (len(tokens) - start, n_vocab)
    return -float(losses(logits, targets).sum()), bool((logits.argmax(axis=1) == targets).all())


def with_bos(runtime: Runtime, text: str) -> list[int]:
    """The tokens of a text, after the one that the model's tokenizer puts in front unless the text has it."""
    tokens = runtime.encode(text, special=True)
    lead = [] if runtime.bos is None or tokens[:1] == [runtime.bos] else [runtime.bos]
    return lead + tokens


def encode_pair(runtime: Runtime, context: str, continuation: str, prefix: int) -> tuple[list[int], int]:
    """Tokens of both and where the continuation begins, as the harness's TemplateLM cuts them.

    Blanks at the context's end go to the continuation; both are encoded as one text and split where the context alone
    ends. Without a context, ``prefix`` stands before.
    """
    if not context:
        tokens = runtime.encode(continuation, special=True)
        return (tokens, 1) if tokens[:1] == [prefix] else ([prefix, *tokens], 1)
    bare = context.rstrip()
    tokens = with_bos(runtime, context + continuation)
    start = len(with_bos(runtime, bare))
    if not 0 < start < len(tokens):
        raise InvalidRequest(
            f"the continuation {continuation!r} adds no token of its own to a context that ends {bare[-40:]!r}"
        )
    return tokens, start


def rolling_windows(tokens: list[int], prefix: int, size: int) -> list[tuple[list[int], int]]:
    """Windows of at most ``size`` inputs that score each token once, the harness's: the last one is full as well."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    found = map(make_disjoint_window, get_rolling_token_windows(tokens, prefix, size, 1))
    return [([*context, *targets], len(context)) for context, targets in found]
