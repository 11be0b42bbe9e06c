"""Multiple choice by the likelihood of each answer's text after the prompt, as lm-evaluation-harness does it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from cusprun.benchmarks.answers import ask
from cusprun.errors import InvalidRequest

T = TypeVar("T")
Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


class Question(Protocol):
    """What :class:`cusprun.corpora.Question` offers."""

    @property
    def prompt(self) -> str: ...
    @property
    def choices(self) -> Sequence[str]: ...
    @property
    def answer(self) -> int: ...


@dataclass(frozen=True)
class McResult:
    """Scores over ``n`` questions, by the plain and by the length-normalised likelihood of the answers."""

    n: int
    accuracy: float  # by the sum of the answer's log-likelihood
    accuracy_normalised: float  # by that sum per UTF-8 byte of the answer
    interval: tuple[float, float]  # Wilson, 95 %, of accuracy
    interval_normalised: tuple[float, float]
    constant_answer_accuracy: float  # always the position that is right most often
    chance: float  # mean of 1 / number of choices
    correct: tuple[bool, ...]
    correct_normalised: tuple[bool, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """The same questions put to two artifacts; ``difference`` is the first's accuracy minus the second's."""

    difference: float
    only_first: int  # questions that only the first got right
    only_second: int
    p_value: float  # McNemar's exact test, two-sided


def multiple_choice(
    artifact: Path,
    questions: Sequence[Question],
    *,
    limit: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> McResult:
    """Accuracy of a model folder, .gguf file or ONNX folder; with ``limit`` on so many questions, at even distances.

    The prompt goes through the chat template as the user's turn, and the choices are scored as the assistant's; a model
    without a template sees the prompt, a blank and the choice. Each artifact reads the same texts in its own tokens, so
    that accuracies compare whatever the vocabularies are. Answers are kept: what this artifact was asked before is not
    asked again (benchmarks/answers.py).
    Raises InvalidRequest for a question without two choices or one that is longer than the model's context, Failed
    where the artifact does not run.
    """
    questions = spread(questions, limit)
    check_questions(questions)
    requests = [
        {"kind": "choices", "prompt": question.prompt, "choices": list(question.choices)} for question in questions
    ]
    found = ask(artifact, requests, threads=threads, device=device)
    return score(questions, found)


def spread(questions: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most ``limit`` questions at even distances, always the same ones."""
    if limit is None or len(questions) <= limit:
        return questions
    if limit < 1:
        raise InvalidRequest(f"{limit} questions score nothing: write 1 or more")
    return [questions[index * len(questions) // limit] for index in range(limit)]


def check_questions(questions: Sequence[Question]) -> None:
    """Raises InvalidRequest that names every question which cannot be scored."""
    problems = []
    for index, question in enumerate(questions):
        if len(question.choices) < 2:
            problems.append(f"question {index} has {len(question.choices)} choices: it needs two or more")
        elif not 0 <= question.answer < len(question.choices):
            problems.append(f"question {index} has answer {question.answer} of {len(question.choices)} choices")
        elif not all(choice.strip() for choice in question.choices):
            problems.append(f"question {index} has an empty choice")
    if not questions:
        problems.append("there is no question to score")
    if problems:
        raise InvalidRequest.together(problems)


def score(questions: Sequence[Question], likelihoods: Sequence[Sequence[float]]) -> McResult:
    """Accuracies from the summed log-likelihood of every choice, (n, choices) nats."""
    raw, normalised = [], []
    for question, sums in zip(questions, likelihoods, strict=True):
        lengths = [len(choice.encode()) for choice in question.choices]
        raw.append(int(np.argmax(sums)) == question.answer)
        normalised.append(int(np.argmax(np.asarray(sums) / lengths)) == question.answer)
    n = len(questions)
    return McResult(
        n=n,
        accuracy=sum(raw) / n,
        accuracy_normalised=sum(normalised) / n,
        interval=wilson(sum(raw), n),
        interval_normalised=wilson(sum(normalised), n),
        constant_answer_accuracy=max(Counter(question.answer for question in questions).values()) / n,
        chance=sum(1 / len(question.choices) for question in questions) / n,
        correct=tuple(raw),
        correct_normalised=tuple(normalised),
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927)."""
    share = successes / n
    centre = share + Z_95**2 / (2 * n)
    reach = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """McNemar's exact test on two artifacts' answers to the same questions."""
    if len(first) != len(second):
        raise InvalidRequest(f"{len(first)} answers cannot be paired with {len(second)}")
    only_first = sum(one and not other for one, other in zip(first, second, strict=True))
    only_second = sum(other and not one for one, other in zip(first, second, strict=True))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1)) / 2**discordant
    difference = (only_first - only_second) / len(first)
    return Paired(difference, only_first, only_second, min(1.0, 2 * tail))
