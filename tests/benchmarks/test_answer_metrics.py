"""Scores against the libraries and papers that define them, and how sure they are against known statistics."""

from __future__ import annotations

import numpy as np
import pytest

from cusprun.benchmarks.answer_metrics import (
    accuracy,
    chrf_measures,
    macro_f1,
    mean_measure,
    qa_measures,
    rouge_measures,
)
from cusprun.benchmarks.resampling import difference, figure
from cusprun.benchmarks.tasks import paired

ANSWERS = ["The Eiffel-Tower!", "a cat and a dog", "", "in 1998", "Paris, France", "the the", "Ein Hund"]
REFERENCES = [["Eiffel Tower", "eiffeltower"], ["dog and cat"], ["nothing"], ["1998"], ["Paris"], ["a"], ["ein Hund"]]
GERMAN = ["Die Straße ist naß.", "Über den Dächern von Köln", "Kein Wort davon"]
GERMAN_REFERENCES = ["Die Straße war naß.", "Über Köln", "Etwas ganz anderes"]


def whole(measure: object, n: int) -> float:
    return float(measure.of(np.arange(n)))  # type: ignore[attr-defined]


def test_exact_match_and_f1_are_squad_s() -> None:
    """By hand after the normalisation of SQuAD's evaluate-v2.0.py: case, punctuation, articles, blanks."""
    exact, f1 = qa_measures(ANSWERS, REFERENCES)
    by_item = [(exact.of(np.array([index])), f1.of(np.array([index]))) for index in range(len(ANSWERS))]
    expected = [
        (1, 1),  # eiffeltower
        (0, 1),  # the same three words in another order
        (0, 0),
        (0, 2 / 3),
        (0, 2 / 3),
        (1, 1),  # nothing is left of either
        (1, 1),
    ]
    assert by_item == [pytest.approx(pair) for pair in expected]
    assert whole(exact, len(ANSWERS)) == pytest.approx(3 / 7)


def test_macro_f1_is_scikit_learn_s() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    said, wanted = (["abcd"[i] for i in rng.integers(0, top, 40)] for top in (4, 3))
    measure = macro_f1("macro_f1", said, wanted)
    assert whole(measure, 40) == pytest.approx(f1_score(wanted, said, average="macro"))
    index = np.array([0, 0, 5, 9])  # a part without every label
    one, other = [wanted[i] for i in index], [said[i] for i in index]
    assert measure.of(index) == pytest.approx(f1_score(one, other, average="macro"))


def test_rouge_is_rouge_score_s_and_reads_every_alphabet() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    said, wanted = "The tenant pays the rent, monthly.", "Rent is paid by the tenant each month."
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(wanted, said)
    for measure in rouge_measures([said], [wanted]):
        assert whole(measure, 1) == pytest.approx(plain[measure.name].fmeasure)
    assert whole(rouge_measures(["über"], ["ober"])[0], 1) == 0  # rouge-score alone reads both as 'ber' and 'ober'
    assert whole(rouge_measures(["Ελλάδα"], ["Ελλάδα"])[0], 1) == 1


def test_chrf_is_sacrebleu_s_over_the_whole_corpus() -> None:
    from sacrebleu import corpus_chrf

    (measure,) = chrf_measures(GERMAN, GERMAN_REFERENCES)
    for index in ([0, 1, 2], [2, 0, 0]):
        said, wanted = [GERMAN[i] for i in index], [GERMAN_REFERENCES[i] for i in index]
        assert measure.of(np.array(index)) == pytest.approx(corpus_chrf(said, [wanted]).score / 100)


def test_an_interval_is_scipy_s_percentile_bootstrap() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).gamma(2.0, size=150)
    found = figure(mean_measure("f1", values.tolist()), len(values))
    exact = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert found.interval == pytest.approx((exact.low, exact.high), abs=0.03)
    assert figure(mean_measure("f1", [0.5]), 1).interval is None


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    items = rng.normal(0.5, 0.3, 80)
    better, worse = items + rng.normal(0.02, 0.03, 80), items
    found = difference(mean_measure("f1", better.tolist()), mean_measure("f1", worse.tolist()), 80)
    gap = better - worse
    error = gap.std() / np.sqrt(80)
    assert found.value == pytest.approx(gap.mean())
    assert found.interval == pytest.approx((gap.mean() - 1.96 * error, gap.mean() + 1.96 * error), abs=0.4 * error)
    assert found.p_value is not None
    assert found.p_value < 0.01
    assert found.test.startswith("paired bootstrap")


def test_a_p_value_is_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(40):
        one, other = (mean_measure("f1", rng.normal(size=60).tolist()) for _ in range(2))
        found = difference(one, other, 60).p_value
        assert found is not None
        p_values.append(found)
    assert 0.3 < np.mean(p_values) < 0.7
    assert np.mean(np.array(p_values) < 0.05) < 0.2


def test_right_and_wrong_go_through_mcnemar_and_few_items_tell_nothing() -> None:
    one, other = [True] * 9 + [False] * 3 + [True] * 8, [False] * 9 + [True] * 3 + [True] * 8
    found = difference(accuracy("accuracy", one), accuracy("accuracy", other), 20)
    assert (found.p_value, found.test) == (paired(one, other).p_value, "McNemar, exact")
    same = mean_measure("f1", [0.5] * 20)
    assert difference(same, same, 20).p_value == 1
    few = difference(mean_measure("f1", [0.5, 0.5]), mean_measure("f1", [0.1, 0.1]), 2)
    assert few.p_value is None
    assert "fewer than 10" in few.test
