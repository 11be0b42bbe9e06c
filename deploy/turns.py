"""A conversation as the tokens a model reads: what a turn says stays text, also where it spells a special token.

`<|im_end|>` typed into a question would otherwise end the question and forge the next turn. The template's own text is
encoded with its special tokens, the contents without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import jinja2

from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import Message

# Private-use characters: no template looks for them, and no text has them by chance in this order.
OPEN, CLOSE = "\ue2f0\ue2f1", "\ue2f1\ue2f0"
MARK = re.compile(f"{OPEN}([0-9]+){CLOSE}")


class Tokenizer(Protocol):
    """The part of a runtime that a conversation needs."""

    def encode(self, text: str, *, special: bool = False) -> list[int]: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def has_chat_template(self) -> bool: ...

    def chat_prompt(self, messages: Sequence[Message]) -> str: ...


def encode_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The conversation as token ids, ready for the assistant's turn.

    Raises InvalidRequest where the template refuses the conversation, or where a content spells a special token and
    the template changes contents in a way that does not let them be told from its own text.
    """
    rendered = _render(tokenizer, messages)
    if not tokenizer.has_chat_template:
        tokens = tokenizer.encode(rendered)
        return tokens if tokenizer.bos is None else [tokenizer.bos, *tokens]
    # A chat template writes the token in front itself where the model wants one.
    if not any(_spells_special(tokenizer, message.content) for message in messages):
        return tokenizer.encode(rendered, special=True)  # in one piece, as the model learnt it
    tokens = []
    for text, own in _pieces(tokenizer, messages, rendered):
        tokens += tokenizer.encode(text, special=own)
    return tokens


def _spells_special(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.encode(text, special=True) != tokenizer.encode(text)


def _pieces(tokenizer: Tokenizer, messages: Sequence[Message], rendered: str) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces, each with whether it is the template's own text."""
    marked = _render(tokenizer, [Message(turn.role, f"{OPEN}{number}{CLOSE}") for number, turn in enumerate(messages)])
    parts = MARK.split(marked)  # template, number, template, number ... template
    contents = [message.content for message in messages]
    for said in (contents, [content.strip() for content in contents]):
        pieces = [(part, True) if at % 2 == 0 else (said[int(part)], False) for at, part in enumerate(parts)]
        if "".join(text for text, _ in pieces) == rendered:
            return [piece for piece in pieces if piece[0]]
    spelt = next(message for message in messages if _spells_special(tokenizer, message.content))
    raise InvalidRequest(
        f"the {spelt.role}'s message spells a special token of the model, and its chat template does not keep messages "
        "as they are: leave the token's name out"
    )


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    try:
        return tokenizer.chat_prompt(messages)
    except Failed as error:
        raise InvalidRequest(str(error)) from error
    except (jinja2.TemplateError, TypeError) as error:  # transformers' own rendering
        raise InvalidRequest(f"the model's chat template does not take this conversation: {error}") from error
