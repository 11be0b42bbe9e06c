"""What a chat template puts around one question, for runtimes that have no Jinja. Nothing of it depends on the day."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cusprun.errors import InvalidRequest
from cusprun.runtimes import Message
from cusprun.runtimes.chat_template import join_turns, on_the_same_day, render_chat

MARK = "Question 7f3a9c"  # letters that no template changes or holds


@dataclass(frozen=True)
class Prompt:
    """Text before and after the question."""

    before: str
    after: str


def prompt_around_a_question(model: Path) -> Prompt:
    """Read from the tokenizer of a model folder. Raises InvalidRequest where the template drops or repeats it."""
    from cusprun.checkpoint import load_tokenizer

    tokenizer, asked = load_tokenizer(model), [Message("user", MARK)]
    if tokenizer.chat_template is None:
        text = join_turns(asked)
    else:
        special = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
        text = render_chat(on_the_same_day(tokenizer.chat_template), asked, **special)
    before, mark, after = text.partition(MARK)
    if not mark or MARK in after:
        raise InvalidRequest(f"{model}: its chat template does not write a question once: ship the GGUF alone")
    return Prompt(before, after)
