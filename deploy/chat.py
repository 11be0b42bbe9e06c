"""Talks to an expert in the terminal: the answer streams, the conversation is kept as far as the context holds it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cusprun.deploy.turns import encode_turns
from cusprun.errors import Failed, InvalidRequest
from cusprun.progress import say
from cusprun.runtimes import GENAI_CONFIG, Message, Runtime, Sampling, is_onnx, open_runtime
from cusprun.runtimes.generation import TextStream

CONTEXT = 4096  # tokens, where the model was trained for as many
PROMPT = "> "
# Control characters that could steer a terminal; newline and tab stay.
STEERING = dict.fromkeys([*range(9), *range(11, 32), 127, *range(128, 160)])


def find_artifact(path: Path) -> Path:
    """The .gguf file, ONNX folder or model folder that ``path`` stands for.

    Each of these stands for itself; an expert folder for the first artifact that its expert.json lists, else for the
    smallest .gguf in gguf/, else for model/. Raises InvalidRequest where there is none of these.
    """
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if is_onnx(path) or (path / "config.json").is_file():
            return path
        found = _listed(path) or _smallest_gguf(path / "gguf") or _smallest_gguf(path)
        if found is not None:
            return found
        if (path / "model" / "config.json").is_file():
            return path / "model"
    raise InvalidRequest(
        f"{path} is nothing to talk to: name an expert's folder, a model folder (with config.json), a .gguf file or an "
        f"ONNX folder (with {GENAI_CONFIG})"
    )


def _listed(folder: Path) -> Path | None:
    card = folder / "expert.json"
    if not card.is_file():
        return None
    try:
        listed = [entry["path"] for entry in json.loads(card.read_text(encoding="utf-8"))["artifacts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{card} is damaged: {error}") from error
    for name in listed:
        artifact = folder / str(name)
        there = (artifact.suffix == ".gguf" and artifact.is_file()) or is_onnx(artifact)
        if there and artifact.resolve().is_relative_to(folder.resolve()):
            return artifact
    return None


def _smallest_gguf(folder: Path) -> Path | None:
    return min(folder.glob("*.gguf"), key=lambda file: (file.stat().st_size, file.name), default=None)


def chat(
    path: Path,
    *,
    system: str | None = None,
    once: str | None = None,
    sampling: Sampling | None = None,
    threads: int | None = None,
    context: int = CONTEXT,
    stream: TextIO | None = None,
    input: TextIO | None = None,
) -> None:
    """Answers one prompt (``once``, or an input that is no terminal, read to its end) or talks until Ctrl-D.

    Ctrl-C ends the answer and not the talk. Answers go to ``stream``, everything else to stderr. Raises
    InvalidRequest where there is nothing to answer or it does not fit the context.
    """
    source, sink = input or sys.stdin, stream or sys.stdout
    prompt = once
    if prompt is None and not source.isatty():
        prompt = source.read()
    if prompt is not None and not prompt.strip():
        raise InvalidRequest("there is no prompt: write one after --once, pipe one in, or talk from a terminal")
    runtime = open_runtime(find_artifact(path), context=context, threads=threads)
    conversation = Conversation(runtime, sampling or Sampling(), system)
    try:
        if prompt is not None:
            show(conversation.answer(prompt.strip()), sink)
        else:
            _talk(conversation, source, sink)
    finally:
        runtime.close()


class Conversation:
    """The turns so far, and the model that adds to them."""

    def __init__(self, runtime: Runtime, sampling: Sampling, system: str | None) -> None:
        self._runtime, self._sampling = runtime, sampling
        self._system = [Message("system", system)] if system else []
        self.turns: list[Message] = []

    def answer(self, prompt: str) -> Iterator[str]:
        """Yields the answer in pieces of whole characters; both turns are kept, also when it is ended early."""
        self.turns.append(Message("user", prompt))
        try:
            tokens = self._fit()
        except InvalidRequest:
            self.turns.pop()
            raise
        said: list[str] = []
        text = TextStream(self._runtime)
        count = 0
        try:
            for token in self._runtime.generate(tokens, self._sampling):
                count += 1
                said.append(text.feed(token))
                yield said[-1]
            said.append(text.flush())
            yield said[-1]
        finally:
            self.turns.append(Message("assistant", "".join(said)))
        if count == self._sampling.max_tokens:
            say(f"(the answer was cut at {count} tokens)")
        elif len(tokens) + count == self._runtime.n_context:
            say(f"(the answer was cut: the context of {self._runtime.n_context} tokens is full)")

    def _fit(self) -> list[int]:
        """The conversation as tokens; the oldest turns go until there is room for an answer."""
        room = self._runtime.n_context - min(self._sampling.max_tokens, self._runtime.n_context // 4)
        dropped = 0
        while True:
            tokens = self._encode()
            if len(tokens) <= room or len(self.turns) == 1:
                break
            del self.turns[:2]  # a question and its answer
            dropped += 1
        if dropped:
            say(
                f"(the context of {self._runtime.n_context} tokens is full: the oldest {dropped} answers are forgotten)"
            )
        if len(tokens) >= self._runtime.n_context:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens and the context {self._runtime.n_context}: shorten it"
            )
        return tokens

    def _encode(self) -> list[int]:
        return encode_turns(self._runtime, [*self._system, *self.turns])


def _talk(conversation: Conversation, source: TextIO, sink: TextIO) -> None:
    # It reads Ctrl-C as a key. A signal would also throw away what was typed, and is lost where it comes just before
    # a blocking read.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input import create_input
    from prompt_toolkit.output import create_output

    session = PromptSession[str](input=create_input(source), output=create_output(always_prefer_tty=True))
    say("Ctrl-C ends an answer, Ctrl-D the conversation.")
    with _CtrlC() as ctrl_c:
        while True:
            ctrl_c.pressed = False
            try:
                prompt = session.prompt(PROMPT).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if prompt:
                try:
                    show(ctrl_c.cut(conversation.answer(prompt)), sink)
                except (InvalidRequest, Failed) as error:
                    say(str(error))


class _CtrlC:
    """Ctrl-C ends the answer that is being given. It raises nothing, so that no number of them ends the program."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> _CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.pressed = True

    def cut(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces up to the next Ctrl-C."""
        for piece in pieces:
            yield piece
            if self.pressed:
                return


def show(pieces: Iterator[str], sink: TextIO) -> None:
    """Writes pieces as they come; a terminal gets no control characters and no character it cannot show."""
    terminal, encoding = sink.isatty(), sink.encoding or "utf-8"
    for piece in pieces:
        shown = piece.translate(STEERING) if terminal else piece
        sink.write(shown.encode(encoding, errors="replace").decode(encoding))
        sink.flush()
    sink.write("\n")
    sink.flush()
