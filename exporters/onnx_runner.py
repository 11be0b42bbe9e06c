"""Runs the ONNX model in this folder with plain onnxruntime, greedily:

pip install onnxruntime tokenizers jinja2
python run.py "What is a contract?"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from onnx_session import OnnxSession  # type: ignore[import-not-found]  # lies beside this file in the folder
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


def generate(session: OnnxSession, tokens: list[int], most: int) -> Iterator[int]:
    """Yields the likeliest tokens after ``tokens`` until the model ends its answer."""
    logits = session.append(tokens)
    for _ in range(min(most, session.context - session.filled)):
        token = int(logits[-1].argmax())
        if token in session.end_tokens:
            return
        yield token
        logits = session.append([token])


def chat_prompt(text: str) -> str:
    """``text`` as the user's turn in the model's chat template; as it is where there is none."""
    settings = json.loads((HERE / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = HERE / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if not template:
        return text
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    special = {key: settings.get(key) or "" for key in ("bos_token", "eos_token")}
    special = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
    turns = [{"role": "user", "content": text}]
    return environment.from_string(template).render(messages=turns, add_generation_prompt=True, **special)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores")
    parser.add_argument("--cuda", action="store_true")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    session = OnnxSession(HERE, threads=arguments.threads, provider="CUDA" if arguments.cuda else "CPU")
    tokens = tokenizer.encode(chat_prompt(arguments.prompt), add_special_tokens=False).ids
    said: list[int] = []
    shown = ""
    for token in generate(session, tokens, arguments.max_tokens):
        said.append(token)
        text = tokenizer.decode(said)
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print(tokenizer.decode(said)[len(shown) :])  # what ended within a character


if __name__ == "__main__":
    main()
