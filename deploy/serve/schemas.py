"""What clients may send, field by field as OpenAI's interface names it; what would be ignored in silence is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cusprun.deploy.serve.settings import MOST_CHOICES
from cusprun.runtimes import Message, Sampling

StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=4)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[dict[str, Any], Field(max_length=0)]
Count = Annotated[int, Field(ge=1)]


def _no_number(value: object) -> object:
    if isinstance(value, bool):
        return value
    raise ValueError("write false")  # 0 is equal to it, and no truth value


No = Annotated[Literal[False], BeforeValidator(_no_number)]


class Strict(BaseModel):
    """Types as they stand in the JSON, and no field that is not named."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(Strict):
    """One part of a message."""

    type: Literal["text"]
    text: str


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(None, description="Taken and not used.")

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Taken and not used.")


class TextFormat(Strict):
    """The only form of an answer."""

    type: Literal["text"]


class Generation(Strict):
    """What both kinds of completion share."""

    model: str = Field(description="The model's id, as /v1/models tells it.")
    max_tokens: Count | None = Field(None, description="Most tokens of an answer; by itself the server's limit.")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1, description="Share of the probability to draw from; default 1.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed draws the same answer; by itself a random one."
    )
    stop: StopString | StopStrings | None = Field(None, description="Ends the answer; is no part of it.")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Answers, generated one after the other.")
    stream: bool | None = Field(None, description="Answer by server-sent events, as the text grows.")
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="Only 0.")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="Only 0.")
    logit_bias: Bias | None = Field(None, description="Only empty.")
    user: str | None = Field(None, description="Taken and not used.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true alone")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, seed: int) -> Sampling:
        return Sampling(
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            max_tokens=max_tokens,
            seed=seed if self.seed is None else self.seed,
        )


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: Count | None = Field(None, description="The same as max_tokens.")
    logprobs: bool | None = Field(None, description="Tell the logarithmic probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And those of so many likeliest tokens.")
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: No | None = Field(None, description="Only false: nothing is stored.")
    metadata: dict[str, str] | None = Field(None, description="Taken and not used.")

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true alone")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
    ) = Field(
        description="A text, several, or token ids. The text of a special token counts as the token: templates may be "
        "written by hand here, and text of others does not belong here unchecked."
    )
    logprobs: int | None = Field(None, ge=0, le=5, description="Likeliest tokens to tell at each step.")
    echo: No | None = Field(None, description="Only false.")
    suffix: None = Field(None, description="Only null.")
    best_of: int | None = Field(None, ge=1, le=1, description="Only 1.")

    @property
    def most(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
