"""Renders a chat template as transformers does: a Jinja sandbox in which a template can neither write nor reach out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from cusprun.errors import Failed
from cusprun.runtimes import Message

DAY = "26 Jul 2024"  # what the templates of Llama 3.1 and 3.2 fall back to where they cannot ask for the date


def render_chat(template: str, messages: Sequence[Message], *, bos: str = "", eos: str = "") -> str:
    """The conversation as ``template`` writes it, with the start of the assistant's turn.

    Raises Failed where the template does not parse or refuses the conversation.
    """
    import jinja2

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _compile(template).render(
            messages=turns, add_generation_prompt=True, bos_token=bos, eos_token=eos, tools=None, documents=None
        )
    except jinja2.TemplateError as error:
        raise Failed(f"the model's chat template does not take this conversation: {error}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The template ready to render: compiling takes longer than rendering, and a server renders for every request."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def on_the_same_day(template: str) -> str:
    """The template, for which it is always :data:`DAY`: what is made of it once must not tell the date it was made."""
    return f"{{% macro strftime_now(form) %}}{DAY}{{% endmacro %}}\n" + template


def join_turns(messages: Sequence[Message]) -> str:
    """The conversation of a model without a chat template: contents, parted by blank lines."""
    return "\n\n".join(message.content for message in messages) + "\n\n"
