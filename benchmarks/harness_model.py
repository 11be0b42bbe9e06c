"""An artifact as lm-evaluation-harness sees a model; importing this imports the harness.

The harness asks in text and never loads the artifact: every request goes to benchmarks/answers.py, which runs it
(native runtimes in a process of their own), encodes as the harness's own Hugging Face model does and keeps the answers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from cusprun.benchmarks.answers import ask
from cusprun.checkpoint import load_tokenizer
from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import GENAI_CONFIG, Message, is_onnx, open_runtime
from cusprun.runtimes.chat_template import render_chat
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.gguf_header import load_metadata

WINDOW = 2048  # most tokens of a rolling window; the Hugging Face model's max_length where a config names none
NEW_TOKENS = 256  # where a task names no number, as the harness's models have it


class ArtifactLM(LM):
    """A .gguf file, an ONNX folder or a model folder. Raises InvalidRequest where it is none of them."""

    def __init__(self, artifact: Path, *, fresh: bool = False, threads: int | None = None, device: str = "cpu") -> None:
        super().__init__()
        self._artifact = artifact
        self._settings: dict[str, Any] = {"fresh": fresh, "threads": threads, "device": device}
        self._template, self._special, self._prefix, self._window = _text_side(artifact)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        asked = [
            {"kind": "loglikelihood", "context": context, "continuation": continuation, "prefix": self._prefix}
            for context, continuation in (request.args for request in requests)
        ]
        return [(value, greedy) for value, greedy in ask(self._artifact, asked, **self._settings)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        asked = [
            {"kind": "rolling", "text": request.args[0], "prefix": self._prefix, "window": self._window}
            for request in requests
        ]
        return ask(self._artifact, asked, **self._settings)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        seen: Counter[str] = Counter()
        asked = []
        for context, settings in (request.args for request in requests):
            wanted = normalize_gen_kwargs(settings, NEW_TOKENS)
            one = {
                "kind": "generate",
                "prompt": context,
                "until": handle_stop_sequences(wanted["until"], eos=self._special["eos"] or None),
                "max_new_tokens": wanted["max_gen_toks"],
                "temperature": wanted["temperature"] if wanted["do_sample"] else 0.0,
                "top_p": wanted.get("top_p", 1.0),
            }
            one["seed"] = seen[repr(one)] if one["temperature"] else 0  # repeats of a drawn answer differ
            seen[repr({name: value for name, value in one.items() if name != "seed"})] += 1
            asked.append(one)
        return ask(self._artifact, asked, **self._settings)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's chat template writes it; without the prompt the last turn is left open."""
        if self._template is None:
            raise InvalidRequest(f"{self._artifact} has no chat template: leave --apply-chat-template out")
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        opened = "" if add_generation_prompt else turns.pop().content
        return render_chat(self._template, turns, **self._special) + opened

    @property
    def tokenizer_name(self) -> str:
        return self._artifact.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template if chat_template else None


def _text_side(artifact: Path) -> tuple[str | None, dict[str, str], int, int]:
    """Chat template, text of BOS and EOS, the token before a text without context, tokens of a rolling window."""
    ids: dict[str, int | None]
    if artifact.is_file():
        info = load_metadata(artifact)
        ids = {name: info.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        special = run_in_child(token_texts, str(artifact), ids)
        template, window = info.metadata.get("tokenizer.chat_template"), info.context_length
    else:
        tokenizer = load_tokenizer(artifact)
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        special = {"bos": str(tokenizer.bos_token or ""), "eos": str(tokenizer.eos_token or "")}
        template, window = tokenizer.chat_template, _trained_context(artifact)
    prefix = ids["bos"] if ids["bos"] is not None else ids["eos"]
    if prefix is None:
        raise Failed(f"{artifact} names neither a first nor a last token, and the harness needs one of them")
    return template or None, special, prefix, min(WINDOW, window)


def token_texts(artifact: str, ids: dict[str, int | None]) -> dict[str, str]:
    """The texts of some tokens of a .gguf file, by the runtime that reads it; empty where there is no such token."""
    runtime = open_runtime(Path(artifact), context=16)
    return {name: "" if number is None else runtime.decode([number]) for name, number in ids.items()}


def _trained_context(folder: Path) -> int:
    """Tokens that the model of a folder was trained for."""
    if is_onnx(folder):
        return int(json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["context_length"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings", WINDOW))
