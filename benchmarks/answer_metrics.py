"""Scores of answers: SQuAD's exact match and F1, ROUGE, chrF, accuracy and macro-F1, as shares of 1.

A :class:`Measure` is a score of any part of the items, so that the same figure can be taken of resampled items
(benchmarks/resampling.py). Exact match and F1: Rajpurkar et al. 2016, arXiv 1606.05250; ROUGE: Lin 2004, by
rouge-score; chrF: Popović 2015, by sacrebleu, whose 0 to 100 is 0 to 1 here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Measure:
    """A score; ``of`` takes indices of items, (n,) integers, some of them perhaps more than once."""

    name: str
    of: Callable[[np.ndarray], float]
    right: tuple[bool, ...] | None = None  # by item, where an answer is right or wrong


def normalise_answer(text: str) -> str:
    """SQuAD's: lower case without punctuation and English articles, single blanks."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the normalised answer is one of the normalised references."""
    return normalise_answer(answer) in map(normalise_answer, references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of shared words with a reference; of two texts without words 1."""
    return max(_f1(normalise_answer(answer).split(), normalise_answer(reference).split()) for reference in references)


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def mean_measure(name: str, values: Sequence[float]) -> Measure:
    """The mean of a score that every item has."""
    array = np.asarray(values, dtype=np.float64)
    return Measure(name, lambda index: float(array[index].mean()))


def accuracy(name: str, right: Sequence[bool]) -> Measure:
    """The share of right answers."""
    array = np.asarray(right, dtype=np.float64)
    return Measure(name, lambda index: float(array[index].mean()), tuple(bool(value) for value in right))


def macro_f1(name: str, said: Sequence[str], wanted: Sequence[str]) -> Measure:
    """The mean over the labels, said or wanted, of F1 = 2 tp / (2 tp + fp + fn); of resampled items over theirs."""
    labels = {label: number for number, label in enumerate(sorted({*said, *wanted}))}
    one = np.array([labels[label] for label in said])
    other = np.array([labels[label] for label in wanted])

    def of(index: np.ndarray) -> float:
        given, true = one[index], other[index]
        hits = np.bincount(true[given == true], minlength=len(labels))
        total = np.bincount(given, minlength=len(labels)) + np.bincount(true, minlength=len(labels))
        seen = total > 0
        return float((2 * hits[seen] / total[seen]).mean())

    return Measure(name, of)


def qa_measures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Measure]:
    """Exact match and F1 over words."""
    pairs = list(zip(answers, references, strict=True))
    return [
        accuracy("exact_match", [exact_match(*pair) for pair in pairs]),
        mean_measure("f1", [token_f1(*pair) for pair in pairs]),
    ]


class _Words:
    """Words of any alphabet for rouge-score, whose own tokenizer keeps a-z and digits alone; on those they agree."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge_measures(answers: Sequence[str], references: Sequence[str]) -> list[Measure]:
    """F-measures of shared words, pairs of words, and the longest common subsequence, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=_Words())
    found = [scorer.score(reference, said) for said, reference in zip(answers, references, strict=True)]
    return [mean_measure(name, [scores[name].fmeasure for scores in found]) for name in ROUGE]


def chrf_measures(answers: Sequence[str], references: Sequence[str]) -> list[Measure]:
    """Corpus chrF: the n-gram counts of all items in one score, as sacrebleu's corpus_chrf has it."""
    from sacrebleu.metrics.chrf import CHRF

    metric: Any = CHRF()
    # By sentence what corpus_score adds up; the same two steps that sacrebleu's own bootstrap takes.
    counts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]))

    def of(index: np.ndarray) -> float:
        return float(metric._compute_f_score(counts[index].sum(axis=0).tolist())) / 100

    return [Measure("chrf", of)]
