"""An artifact's answers to items with known answers, by kind, beside a constant answer, chance and the dense model.

choice and classification: the likelihood of each choice as the assistant's turn, plain and per UTF-8 byte. qa,
summarization and translation: the likeliest reply to the prompt, up to ``max_new_tokens``.

What anybody could say without a model is scored the same way: the position or label that is right most often, the most
frequent answer of qa, the first three sentences of what is to be summed up, the untranslated source. Chance is uniform
guessing; of texts that are generated there is none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks.answer_metrics import (
    Measure,
    accuracy,
    chrf_measures,
    macro_f1,
    normalise_answer,
    qa_measures,
    rouge_measures,
)
from cusprun.benchmarks.answers import ask
from cusprun.benchmarks.resampling import Difference, Figure, difference, figure
from cusprun.benchmarks.tasks import spread
from cusprun.corpora.items import FIELDS, Item
from cusprun.errors import InvalidRequest, MissingPackage

LEAD = 3  # sentences
GUESSES = 1000  # answer sheets guessed for a score that has no closed form for guessing
NEEDS = {"summarization": ("rouge_score", "rouge-score"), "translation": ("sacrebleu", "sacrebleu")}
CONSTANTS = {
    "choice": "the position that is right most often",
    "qa": "the most frequent answer",
    "classification": "the most frequent label",
    "summarization": f"the first {LEAD} sentences of the source",
    "translation": "the source",
}


@dataclass(frozen=True)
class Metric:
    """One score of one artifact; ``against`` and ``difference`` where it is held against another."""

    artifact: Figure
    constant: float  # of the answer that needs no model
    chance: float | None
    against: Figure | None
    difference: Difference | None


@dataclass(frozen=True)
class KindResult:
    """All scores of one kind of items."""

    n: int
    constant_answer: str  # what ``constant`` says
    metrics: Mapping[str, Metric]

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)


def check_items(items: Sequence[Item], limit: int | None, max_new_tokens: int) -> None:
    """Raises InvalidRequest, before anything runs, for what cannot be scored or asked."""
    problems = []
    if not items:
        problems.append("there is no item to ask")
    if limit is not None and limit < 1:
        problems.append(f"--limit {limit}: write 1 or more")
    if max_new_tokens < 1:
        problems.append(f"--max-new-tokens {max_new_tokens}: write 1 or more")
    for kind, (module, package) in NEEDS.items():
        if any(item.kind == kind for item in items) and find_spec(module) is None:
            problems.append(str(MissingPackage(package, "eval", f"scoring {kind}")))
    if problems:
        raise InvalidRequest.together(problems)


def evaluate_items(
    artifact: Path,
    items: Sequence[Item],
    *,
    against: Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    fresh: bool = False,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, KindResult]:
    """Scores by kind, in the order of :data:`FIELDS`; with ``limit`` on so many items of each kind, at even distances.

    Raises InvalidRequest for items that cannot be asked, Failed where an artifact does not run.
    """
    check_items(items, limit, max_new_tokens)
    kinds = {kind: list(spread([item for item in items if item.kind == kind], limit)) for kind in FIELDS}
    asked = [item for held in kinds.values() for item in held]
    requests = [request(item, max_new_tokens) for item in asked]
    answers = [
        None if path is None else iter(ask(path, requests, fresh=fresh, threads=threads, device=device))
        for path in (artifact, against)
    ]
    found = {}
    for kind, held in kinds.items():
        if held:
            own, others = (None if side is None else [next(side) for _ in held] for side in answers)
            assert own is not None
            found[kind] = score_kind(kind, held, own, others)
    return found


def request(item: Item, max_new_tokens: int) -> dict[str, Any]:
    """What benchmarks/answers.py is asked of an item; nothing in it tells the right answer."""
    if item.kind in ("choice", "classification"):
        return {"kind": "choices", "prompt": item.prompt, "choices": list(item.choices)}
    return {"kind": "reply", "prompt": item.prompt, "until": list(item.until), "max_new_tokens": max_new_tokens}


def score_kind(kind: str, items: Sequence[Item], own: Sequence[Any], others: Sequence[Any] | None) -> KindResult:
    """All scores of items of one kind from the answers as :func:`cusprun.benchmarks.answers.ask` gives them."""
    n = len(items)
    measures = _measures(kind, items, own)
    against = None if others is None else _measures(kind, items, others)
    constant = _measures(kind, items, constant_answers(kind, items))
    chances = _chances(kind, items)
    metrics = {
        measure.name: Metric(
            artifact=figure(measure, n),
            constant=constant[index].of(np.arange(n)),
            chance=chances.get(measure.name),
            against=None if against is None else figure(against[index], n),
            difference=None if against is None else difference(measure, against[index], n),
        )
        for index, measure in enumerate(measures)
    }
    return KindResult(n, CONSTANTS[kind], metrics)


def constant_answers(kind: str, items: Sequence[Item]) -> list[Any]:
    """What is said without a model, in the form in which an artifact answers."""
    if kind == "choice":
        ((position, _),) = Counter(item.answer for item in items).most_common(1)
        return [_certain(item, position) for item in items]
    if kind == "classification":
        ((label, _),) = Counter(_wanted(item) for item in items).most_common(1)
        return [_certain(item, item.choices.index(label) if label in item.choices else -1) for item in items]
    if kind == "qa":
        said = Counter(
            answer
            for item in items
            for answer in {normalise_answer(reference): reference for reference in item.references}.values()
        )
        return [said.most_common(1)[0][0]] * len(items)
    if kind == "summarization":
        return [lead(item.source) for item in items]
    return [item.source for item in items]


def lead(text: str, sentences: int = LEAD) -> str:
    """The first sentences of a text, each up to a full stop, question or exclamation mark before a blank."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:sentences])


def _certain(item: Item, position: int) -> list[float]:
    """Likelihoods of somebody who is sure of one choice, or of none of them where there is no such position."""
    return [0.0 if index == position else -np.inf for index in range(len(item.choices))]


def _wanted(item: Item) -> str:
    return item.choices[item.answer]


def _picks(items: Sequence[Item], likelihoods: Sequence[Sequence[float]], per_byte: bool) -> list[int]:
    """The likeliest choice of each item, -1 where none is likely at all."""
    picks = []
    for item, sums in zip(items, likelihoods, strict=True):
        lengths = [len(choice.encode()) if per_byte else 1 for choice in item.choices]
        scores = np.asarray(sums) / lengths
        picks.append(int(np.argmax(scores)) if np.isfinite(scores).any() else -1)
    return picks


def _measures(kind: str, items: Sequence[Item], answers: Sequence[Any]) -> list[Measure]:
    by_kind: dict[str, Callable[[], list[Measure]]] = {
        "choice": lambda: _labelled_measures(items, answers, classes=False),
        "classification": lambda: _labelled_measures(items, answers, classes=True),
        "qa": lambda: qa_measures(answers, [item.references for item in items]),
        "summarization": lambda: rouge_measures(answers, [item.references[0] for item in items]),
        "translation": lambda: chrf_measures(answers, [item.references[0] for item in items]),
    }
    return by_kind[kind]()


def _labelled_measures(items: Sequence[Item], answers: Sequence[Any], classes: bool) -> list[Measure]:
    found = []
    wanted = [_wanted(item) for item in items]
    for suffix, per_byte in (("", False), ("_normalised", True)):
        picks = _picks(items, answers, per_byte)
        found.append(
            accuracy(f"accuracy{suffix}", [pick == item.answer for pick, item in zip(picks, items, strict=True)])
        )
        if classes:
            said = [item.choices[pick] if pick >= 0 else "" for pick, item in zip(picks, items, strict=True)]
            found.append(macro_f1(f"macro_f1{suffix}", said, wanted))
    return found


def _chances(kind: str, items: Sequence[Item]) -> dict[str, float]:
    """Scores of uniform guessing; macro-F1's as the mean of many guessed answer sheets."""
    if kind not in ("choice", "classification"):
        return {}
    right = float(np.mean([1 / len(item.choices) for item in items]))
    chances = {"accuracy": right, "accuracy_normalised": right}
    if kind == "classification":
        rng = np.random.default_rng(0)
        wanted, every = [_wanted(item) for item in items], np.arange(len(items))
        guesses = (
            macro_f1("", [item.choices[rng.integers(len(item.choices))] for item in items], wanted).of(every)
            for _ in range(GUESSES)
        )
        chances["macro_f1"] = chances["macro_f1_normalised"] = float(np.mean(list(guesses)))
    return chances
