"""Answers as OpenAI's clients read them: whole, or as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, model_serializer

from cusprun.deploy.serve.job import Done, Scored

Reason = Literal["stop", "length"]


class CachedTokens(BaseModel):
    """Of a prompt, what was not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was drawn, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatReply(BaseModel):
    """The answer to /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new; a field that is not there has nothing new."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _without_nothing(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None


class ChatChunk(BaseModel):
    """One event of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None


class CompletionReply(BaseModel):
    """The answer to /v1/completions, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_window: int
    max_output_tokens: int


class Models(BaseModel):
    """The answer to /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The answer to /health."""

    status: Literal["ok", "stopping"]
    running: int
    waiting: int


def usage_of(done: Done) -> Usage:
    return Usage(
        prompt_tokens=done.prompt_tokens,
        completion_tokens=done.completion_tokens,
        total_tokens=done.prompt_tokens + done.completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=done.cached_tokens),
    )


def chat_logprobs(scored: Sequence[Scored]) -> ChatLogprobs:
    def told(one: Scored) -> TopLogprob:
        return TopLogprob(token=one.text, logprob=one.logprob, bytes=list(one.bytes))

    return ChatLogprobs(
        content=[TokenLogprob(**told(one).model_dump(), top_logprobs=[told(top) for top in one.top]) for one in scored]
    )


def completion_logprobs(scored: Sequence[Scored], offset: int) -> CompletionLogprobs:
    """``offset``: characters of the answer before these tokens."""
    offsets = []
    for one in scored:
        offsets.append(offset)
        offset += len(bytes(one.bytes).decode(errors="replace"))
    return CompletionLogprobs(
        tokens=[one.text for one in scored],
        token_logprobs=[one.logprob for one in scored],
        top_logprobs=[{top.text: top.logprob for top in one.top} for one in scored],
        text_offset=offsets,
    )
