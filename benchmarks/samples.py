"""A few answers of dense and expert beside each other, as shipped: greedy, each artifact in a process of its own.

Which prompts: the first held-out questions in the order in which the build keeps them, and where a scenario has none
the beginnings of held-out documents. Nobody chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cusprun.benchmarks.tasks import Question
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Message, Sampling, open_runtime
from cusprun.runtimes.child import run_in_child

COUNT = 3
LONGEST_ANSWER = 96  # tokens
OPENING = 320  # characters of a document that are given, where a prompt is to be continued
CONTINUATION = 400  # characters of it that are shown as the reference
CONTEXT = 2048
HOW = (
    f"the first {COUNT} held-out questions in the build's own order, with their choices, as the user's turn; where a "
    f"scenario has no questions the first {OPENING} characters of {COUNT} held-out documents, to be continued; greedy "
    f"decoding, at most {LONGEST_ANSWER} tokens, the shipped files, each in a process of its own; of a prompt that the "
    "context does not hold the last tokens are read"
)


@dataclass(frozen=True)
class Prompt:
    """What both are asked; ``reference`` is the right answer or how the document goes on."""

    text: str
    reference: str | None
    turn: bool  # the user's turn in the chat template, or running text to be continued


def prompts(texts: Mapping[str, Sequence[str]], questions: Sequence[Question], count: int = COUNT) -> list[Prompt]:
    """The first questions with their choices, else openings of the first held-out documents of the scenario.

    ``texts``: rendered held-out documents by name of the text; ``scenario`` goes first. May be empty.
    """
    if questions:
        return [_of_question(question) for question in questions[:count]]
    documents = texts.get("scenario") or next(iter(texts.values()), [])
    found = [_of_document(document) for document in documents if len(document) > OPENING + CONTINUATION]
    return (found or [_of_document(document) for document in documents if document.strip()])[:count]


def answers(
    artifact: Path,
    asked: Sequence[Prompt],
    *,
    threads: int | None = None,
    device: str = "cpu",
    longest: int = LONGEST_ANSWER,
) -> list[str]:
    """What a .gguf, ONNX folder or model folder says to each prompt, in a fresh process; without special tokens.

    Raises InvalidRequest where ``longest`` is no length, Failed where the artifact does not run.
    """
    if longest < 1:
        raise InvalidRequest(f"an answer of {longest} tokens says nothing: write 1 or more")
    given = [asdict(prompt) for prompt in asked]
    said: list[str] = run_in_child(_answer_all, str(artifact), given, threads=threads, device=device, longest=longest)
    return said


def sample_answers(
    expert: Path,
    dense: Path,
    asked: Sequence[Prompt],
    *,
    threads: int | None = None,
    device: str = "cpu",
    longest: int = LONGEST_ANSWER,
) -> list[dict[str, Any]]:
    """Rows of report.json's ``samples``: prompt, reference (or None), dense, expert."""
    said = {
        who: answers(path, asked, threads=threads, device=device, longest=longest)
        for who, path in (("dense", dense), ("expert", expert))
    }
    return [
        {
            "prompt": prompt.text,
            "reference": prompt.reference,
            "dense": said["dense"][index],
            "expert": said["expert"][index],
        }
        for index, prompt in enumerate(asked)
    ]


def _of_question(question: Question) -> Prompt:
    lines = [f"{_letter(index)}. {choice}" for index, choice in enumerate(question.choices)]
    return Prompt("\n".join([question.prompt, *lines]), lines[question.answer], turn=True)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _of_document(document: str) -> Prompt:
    """At most half of the document, cut at a blank where there is one in the second half of the opening."""
    longest = min(OPENING, (len(document) + 1) // 2)
    blank = max(document.rfind(" ", longest // 2, longest), document.rfind("\n", longest // 2, longest))
    end = blank if blank > 0 else longest
    return Prompt(document[:end], document[end : end + CONTINUATION].strip() or None, turn=False)


def _answer_all(
    artifact: str, asked: list[dict[str, Any]], threads: int | None, device: str, longest: int
) -> list[str]:
    """The work of :func:`answers` in its process; JSON in, JSON out."""
    runtime = open_runtime(Path(artifact), context=CONTEXT, threads=threads, device=device)
    found = []
    for prompt in asked:
        turn = prompt["turn"] and runtime.has_chat_template
        text = runtime.chat_prompt([Message("user", prompt["text"])]) if turn else prompt["text"]
        tokens = runtime.encode(text, special=True)
        if runtime.bos is not None and tokens[:1] != [runtime.bos]:
            tokens = [runtime.bos, *tokens]
        room = max(2, runtime.n_context - longest)
        if len(tokens) > room:
            tokens = [*tokens[:1], *tokens[1 - room :]]
        said = list(runtime.generate(tokens, Sampling(temperature=0.0, max_tokens=longest)))
        found.append(runtime.decode(said).strip())
    runtime.close()
    return found
