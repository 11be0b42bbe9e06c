"""A chat template in the Go form that Ollama's Modelfile takes, out of the model's own in Jinja, and the Modelfile.

Nothing is translated word by word: the model's template is rendered on probe conversations, and the kind of turns that
gives the same text on each of them is written in Go. A template that is none of these kinds has no Modelfile.
Ollama's templates know no date: one that asks for it is told :data:`~cusprun.runtimes.chat_template.DAY`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cusprun.errors import Failed
from cusprun.runtimes import Message
from cusprun.runtimes.chat_template import DAY, on_the_same_day, render_chat

MODELFILE = "Modelfile"
LONGEST_CONTEXT = 8192  # tokens that a laptop keeps unless it is told otherwise


@dataclass(frozen=True)
class Turns:
    """How a kind of template writes a conversation: what stands before and behind each content."""

    kind: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str  # begins the answer
    stops: tuple[str, ...]
    system: tuple[str, str]  # around a turn of its own, or within a turn of the user's
    within: str | None = None  # "first" or "last" turn of the user's that the system's content stands in
    again: str = ""  # before every turn of the user's but the first
    default: str | None = None  # system's content where a conversation has none; "" where its turn is written even so

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation, as the Go template writes it."""
        if self.default is not None and messages[0].role != "system":
            messages = [Message("system", self.default), *messages]
        said, system, asked = "", "", False
        for index, message in enumerate(messages):
            if message.role == "system" and self.within:
                system = message.content
            elif message.role == "system":
                said += self.system[0] + message.content + self.system[1]
            elif message.role == "user":
                said += (self.again if asked else "") + self.user[0]
                if system and (self.within == "first" or index + 1 == len(messages)):
                    said, system = said + self.system[0] + system + self.system[1], ""
                said += message.content + self.user[1]
                asked = True
            else:
                said += self.assistant[0] + message.content + self.assistant[1]
        return said + self.ask

    def go_template(self) -> str:
        """The same in Go's text/template, over Ollama's .Messages."""
        (user, after_user), (system, after_system), (answer, after_answer) = self.user, self.system, self.assistant
        own = f"{system}{{{{ $m.Content }}}}{after_system}" if not self.within else "{{ $system = $m.Content }}"
        here = "$system" if self.within == "first" else "and $system (eq (len (slice $.Messages $i)) 1)"
        inside = (
            f'{{{{ if {here} }}}}{system}{{{{ $system }}}}{after_system}{{{{ $system = "" }}}}{{{{ end }}}}'
            if self.within
            else ""
        )
        again = f"{{{{ if $asked }}}}{self.again}{{{{ end }}}}{{{{ $asked = true }}}}" if self.again else ""
        always = (
            f'{{{{ if and (eq $i 0) (ne $m.Role "system") }}}}{system}{after_system}{{{{ end }}}}'
            if self.default == ""
            else ""
        )
        return (
            ('{{ $system := "" }}' if self.within else "")
            + ("{{ $asked := false }}" if self.again else "")
            + f'{{{{ range $i, $m := .Messages }}}}{always}{{{{ if eq $m.Role "system" }}}}{own}'
            + f'{{{{ else if eq $m.Role "user" }}}}{again}{user}{inside}{{{{ $m.Content }}}}{after_user}'
            + f'{{{{ else if eq $m.Role "assistant" }}}}{answer}{{{{ $m.Content }}}}{after_answer}{{{{ end }}}}'
            + f"{{{{ end }}}}{self.ask}"
        )


def _roles(kind: str, before: str, after: str, ask: str, stop: str) -> Turns:
    """A kind whose turns differ in the role's name alone."""
    user, assistant, system = ((before.format(role), after) for role in ("user", "assistant", "system"))
    return Turns(kind, user, assistant, ask, (stop,), system)


_LLAMA_3 = _roles("Llama 3", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>",
                  "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")  # fmt: skip
_KNOWLEDGE = f"Cutting Knowledge Date: December 2023\nToday Date: {DAY}\n\n"
_INST = Turns("Llama 2", ("[INST] ", " [/INST]"), (" ", " </s>"), "", ("[INST]", "[/INST]"),
              ("<<SYS>>\n", "\n<</SYS>>\n\n"), "first", "<s>")  # fmt: skip
KINDS = (
    _roles("ChatML", "<|im_start|>{}\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    _LLAMA_3,
    replace(_LLAMA_3, kind="Llama 3.1", system=(_LLAMA_3.system[0] + _KNOWLEDGE, "<|eot_id|>"), default=""),
    _roles("Phi-3", "<|{}|>\n", "<|end|>\n", "<|assistant|>\n", "<|end|>"),
    _roles("Zephyr", "<|{}|>\n", "</s>\n", "<|assistant|>\n", "</s>"),
    Turns("Gemma", ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n"),
          "<start_of_turn>model\n", ("<end_of_turn>",), ("", "\n\n"), "first"),
    _INST,
    replace(_INST, kind="Mistral", assistant=("", "</s>"), system=("", "\n\n"), again=""),
    replace(_INST, kind="Mistral", assistant=(" ", "</s>"), system=("", "\n\n"), again=""),
    *(replace(_INST, kind="Mistral", user=("[INST] ", "[/INST]"), assistant=(" ", "</s>"), system=("", "\n\n"),
              again="", within=place) for place in ("first", "last")),
)  # fmt: skip

_ASKED, _SYSTEM = Message("user", "Who pays the rent?"), Message("system", "Answer in one word.")
_LONGER = (_ASKED, Message("assistant", "The tenant."), Message("user", "When?"))
PROBES = ((_ASKED,), _LONGER, (_SYSTEM, _ASKED), (_SYSTEM, *_LONGER))


def find_turns(template: str, *, bos: str, eos: str, adds_bos: bool) -> Turns | None:
    """The kind of turns that ``template`` writes; None where it is none of :data:`KINDS`.

    ``adds_bos``: the runtime puts the token ``bos`` in front itself, so that the Go template must not.
    """
    said: dict[tuple[Message, ...], str] = {}
    for probe in PROBES:
        try:
            text = render_chat(on_the_same_day(template), probe, bos=bos, eos=eos)
        except Failed:
            if probe[0].role == "user":
                return None  # else: it takes no system's turn
            continue
        said[probe] = text.removeprefix(bos) if adds_bos else text
    for kind in KINDS:
        for turns in (kind, _with_default(kind, said[(_ASKED,)])):
            if turns is not None and all(turns.render(probe) == text for probe, text in said.items()):
                return turns
    return None


def _with_default(kind: Turns, text: str) -> Turns | None:
    """The kind with the system's content that the template itself gave a conversation without one."""
    before, behind = kind.system
    if kind.within or not text.startswith(before) or behind not in text:
        return None
    return replace(kind, default=text[len(before) : text.index(behind)])


def write_modelfile(
    gguf: str, turns: Turns, *, context: int, sampling: Mapping[str, float], ends: Sequence[str] = ()
) -> str:
    """The Modelfile of the file ``gguf`` beside it; ``ends`` are tokens that end an answer."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{turns.go_template()}"""']
    if turns.default and '"""' not in turns.default:
        lines.append(f'SYSTEM """{turns.default}"""')
    stops = dict.fromkeys([*turns.stops, *ends])
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop and stop.isprintable()]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def read_sampling(model: Path) -> dict[str, float]:
    """Ollama's parameters out of the model's generation_config.json; where it names none, the likeliest token."""
    path = model / "generation_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
    found = {
        ours: config[theirs]
        for theirs, ours in names.items()
        if isinstance(config.get(theirs), int | float) and not isinstance(config[theirs], bool)
    }
    if not config.get("do_sample", "temperature" in found):
        found = {key: value for key, value in found.items() if key == "repeat_penalty"}
    return {"temperature": 0, **found}
