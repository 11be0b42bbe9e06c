"""Multiple choice on rigged questions, intervals and tests against known values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cusprun.benchmarks.answers import tokenized
from cusprun.benchmarks.tasks import multiple_choice, paired, score, spread, wilson
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Message, open_runtime
from tests import pico


@dataclass(frozen=True)
class Item:
    prompt: str
    choices: tuple[str, ...]
    answer: int


CHOICES = ("The tenant pays.", "Le tribunal tranche.", "Nobody.", "Das Gericht entscheidet über den Streit.")


def likelihoods(folder: Path, item: Item) -> list[float]:
    """Sum of ln p of each choice after the chat prompt: transformers, one whole forward pass per choice."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": item.prompt}], tokenize=False, add_generation_prompt=True
    )
    start = len(tokenizer.encode(prompt, add_special_tokens=False))
    found = []
    for choice in item.choices:
        ids = tokenizer.encode(prompt + choice, add_special_tokens=False)
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        found.append(sum(float(rows[at - 1, ids[at]]) for at in range(start, len(ids))))
    return found


def test_rigged_questions(folder: Path, gguf: Path) -> None:
    """The answer of every question is what the model itself finds likeliest, but for one."""
    items = [Item(sentence, CHOICES, 0) for sentence in pico.SENTENCES]
    sums = [likelihoods(folder, item) for item in items]
    rigged = [Item(i.prompt, i.choices, int(np.argmax(s))) for i, s in zip(items, sums, strict=True)]
    rigged[2] = Item(rigged[2].prompt, rigged[2].choices, int(np.argmin(sums[2])))
    expected = tuple(index != 2 for index in range(len(rigged)))
    for artifact in (folder, gguf):
        found = multiple_choice(artifact, rigged, threads=1)
        assert found.correct == expected
        assert found.accuracy == pytest.approx(5 / 6)
        assert found.chance == 0.25
        json.dumps(found.as_json(), allow_nan=False)
    per_byte = [np.asarray(s) / [len(c.encode()) for c in CHOICES] for s in sums]
    by_length = [Item(i.prompt, i.choices, int(np.argmax(s))) for i, s in zip(items, per_byte, strict=True)]
    assert multiple_choice(folder, by_length, threads=1).accuracy_normalised == 1


def test_without_a_template_the_choice_follows_a_blank(tmp_path: Path) -> None:
    runtime = open_runtime(pico.save_model(tmp_path / "plain", chat=False))
    (first, start), _ = tokenized(runtime, "The tenant shall pay", ["the rent", "nothing"])
    assert runtime.decode(first) == "The tenant shall pay the rent"
    assert runtime.decode(first[start:]) == " the rent"


def test_the_prompt_is_the_user_s_turn(folder: Path) -> None:
    runtime = open_runtime(folder)
    (first, start), *_ = tokenized(runtime, "Who pays?", CHOICES)
    assert runtime.decode(first[:start]) == runtime.chat_prompt([Message("user", "Who pays?")])
    assert runtime.decode(first[start:]) == CHOICES[0]
    assert first[0] == 1  # <|im_start|>, read as one token


def test_scores_and_constant_answer() -> None:
    items = [Item("p", ("a", "bbbb"), answer) for answer in (0, 0, 1)]
    found = score(items, [[-1.0, -2.0], [-3.0, -2.0], [-1.0, -2.0]])
    assert found.correct == (True, False, False)
    assert found.correct_normalised == (False, False, True)  # per byte: -1 against -0.5, and so on
    assert found.constant_answer_accuracy == pytest.approx(2 / 3)
    assert found.chance == 0.5


def test_a_limit_spreads_the_questions() -> None:
    items = [Item(str(number), ("a", "b"), 0) for number in range(10)]
    assert [item.prompt for item in spread(items, 4)] == ["0", "2", "5", "7"]
    assert spread(items, None) is items
    assert spread(items, 10) is items
    with pytest.raises(InvalidRequest, match="write 1 or more"):
        spread(items, 0)


def test_wilson_interval() -> None:
    """Against SciPy, which has it too."""
    from scipy.stats import binomtest

    for successes, n in ((0, 10), (3, 10), (75, 150), (10, 10)):
        exact = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson(successes, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_mcnemar_is_the_binomial_test() -> None:
    from scipy.stats import binomtest

    first = [True] * 9 + [False] * 3 + [True] * 20
    second = [False] * 9 + [True] * 3 + [True] * 20
    found = paired(first, second)
    assert (found.only_first, found.only_second) == (9, 3)
    assert found.difference == pytest.approx(6 / 32)
    assert found.p_value == pytest.approx(binomtest(3, 12).pvalue)
    assert paired([True, False], [True, False]).p_value == 1
    with pytest.raises(InvalidRequest, match="cannot be paired"):
        paired([True], [True, False])


def test_what_cannot_be_scored_is_said(folder: Path) -> None:
    bad = [Item("p", ("only",), 0), Item("p", ("a", "b"), 2), Item("p", ("a", " "), 0)]
    with pytest.raises(InvalidRequest, match=r"(?s)question 0 has 1 choices.*question 1 has answer 2.*question 2"):
        multiple_choice(folder, bad)
    with pytest.raises(InvalidRequest, match="no question"):
        multiple_choice(folder, [])
