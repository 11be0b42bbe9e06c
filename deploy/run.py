"""Continues a text as a model does by itself: no roles, no template, nothing but the prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cusprun.deploy.chat import CONTEXT, find_artifact, show
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Runtime, Sampling, open_runtime
from cusprun.runtimes.generation import TextStream


def run(
    path: Path,
    prompt: str | None = None,
    *,
    sampling: Sampling | None = None,
    threads: int | None = None,
    context: int = CONTEXT,
    stream: TextIO | None = None,
    input: TextIO | None = None,
) -> None:
    """Writes what follows ``prompt``, or else what follows ``input``, read to its end, to ``stream``.

    The text of a special token counts as the token. Raises InvalidRequest where there is no prompt or it does not fit.
    """
    source, sink = input or sys.stdin, stream or sys.stdout
    if prompt is None:
        if source.isatty():
            raise InvalidRequest('there is no prompt: write one, as in cusprun-edge run ARTIFACT "Once", or pipe it')
        prompt = source.read().removesuffix("\n")  # echo's, and a file's last
    runtime = open_runtime(find_artifact(path), context=context, threads=threads)
    try:
        show(_continue(runtime, prompt, sampling or Sampling()), sink)
    finally:
        runtime.close()


def _continue(runtime: Runtime, prompt: str, sampling: Sampling) -> Iterator[str]:
    tokens = runtime.encode(prompt, special=True)
    if runtime.bos is not None:
        tokens = [runtime.bos, *tokens]
    if not tokens:
        raise InvalidRequest("the prompt is empty and the model has no token to begin with: write a prompt")
    if len(tokens) >= runtime.n_context:
        raise InvalidRequest(f"the prompt has {len(tokens)} tokens and the context {runtime.n_context}: shorten it")
    text = TextStream(runtime)
    for token in runtime.generate(tokens, sampling):
        yield text.feed(token)
    yield text.flush()
