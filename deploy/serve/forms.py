"""From the engine's events to the two forms of an answer, chat and plain text, each whole or as a stream's chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from cusprun.deploy.serve import replies
from cusprun.deploy.serve.job import Done, End, Piece, Scored


@dataclass
class Written:
    """One answer as far as it is known."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    reason: replies.Reason = "length"


class Form(Protocol):
    """How an answer is told; each method returns one JSON document."""

    def whole(self, written: list[Written], done: Done) -> str: ...

    def begin(self, index: int) -> str | None:
        """The chunk that opens answer ``index``, where the form has one."""
        ...

    def piece(self, piece: Piece) -> str: ...

    def end(self, end: End) -> str: ...

    def usage(self, done: Done) -> str | None:
        """The chunk that counts tokens, where one was asked for."""
        ...


class _Named:
    """What every document of one answer repeats."""

    def __init__(self, prefix: str, model: str, told: bool, include_usage: bool) -> None:
        self._id, self._created, self._model = f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model
        self._told = told  # whether logprobs are
        self._include_usage = include_usage


class ChatForm(_Named):
    """/v1/chat/completions."""

    def __init__(self, model: str, told: bool, include_usage: bool) -> None:
        super().__init__("chatcmpl", model, told, include_usage)

    def whole(self, written: list[Written], done: Done) -> str:
        choices = [
            replies.ChatChoice(
                index=index,
                message=replies.Answer(content=one.text),
                logprobs=replies.chat_logprobs(one.scored) if self._told else None,
                finish_reason=one.reason,
            )
            for index, one in enumerate(written)
        ]
        return replies.ChatReply(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=replies.usage_of(done)
        ).model_dump_json()

    def begin(self, index: int) -> str | None:
        return self._chunk(replies.ChatChunkChoice(index=index, delta=replies.Delta(role="assistant", content="")))

    def piece(self, piece: Piece) -> str:
        return self._chunk(
            replies.ChatChunkChoice(
                index=piece.index,
                delta=replies.Delta(content=piece.text),
                logprobs=replies.chat_logprobs(piece.scored) if self._told else None,
            )
        )

    def end(self, end: End) -> str:
        return self._chunk(replies.ChatChunkChoice(index=end.index, delta=replies.Delta(), finish_reason=end.reason))

    def usage(self, done: Done) -> str | None:
        return self._chunk(usage=replies.usage_of(done)) if self._include_usage else None

    def _chunk(self, *choices: replies.ChatChunkChoice, usage: replies.Usage | None = None) -> str:
        chunk = replies.ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=list(choices), usage=usage
        )
        return chunk.model_dump_json(exclude=None if self._include_usage else {"usage"})


class CompletionForm(_Named):
    """/v1/completions."""

    def __init__(self, model: str, told: bool, include_usage: bool) -> None:
        super().__init__("cmpl", model, told, include_usage)
        self._shown: dict[int, int] = {}  # characters of each answer

    def whole(self, written: list[Written], done: Done) -> str:
        choices = [
            replies.CompletionChoice(
                index=index,
                text=one.text,
                logprobs=replies.completion_logprobs(one.scored, 0) if self._told else None,
                finish_reason=one.reason,
            )
            for index, one in enumerate(written)
        ]
        return self._reply(choices, replies.usage_of(done)).model_dump_json()

    def begin(self, index: int) -> str | None:
        return None

    def piece(self, piece: Piece) -> str:
        before = self._shown.get(piece.index, 0)
        self._shown[piece.index] = before + len(piece.text)
        logprobs = replies.completion_logprobs(piece.scored, before) if self._told else None
        return self._chunk(replies.CompletionChoice(index=piece.index, text=piece.text, logprobs=logprobs))

    def end(self, end: End) -> str:
        return self._chunk(replies.CompletionChoice(index=end.index, text="", finish_reason=end.reason))

    def usage(self, done: Done) -> str | None:
        return self._chunk(usage=replies.usage_of(done)) if self._include_usage else None

    def _chunk(self, *choices: replies.CompletionChoice, usage: replies.Usage | None = None) -> str:
        reply = self._reply(list(choices), usage)
        return reply.model_dump_json(exclude=None if self._include_usage else {"usage"})

    def _reply(self, choices: list[replies.CompletionChoice], usage: replies.Usage | None) -> replies.CompletionReply:
        return replies.CompletionReply(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
