"""The sizes of the vocabulary that a plan may choose, and what they are said to cost."""

from __future__ import annotations

import numpy as np
import pytest

from cusprun.anatomy import Anatomy, LayerWidths
from cusprun.anatomy.llama import FAMILY
from cusprun.rows import AUTO_NATS, GENERAL_IN_PRICE, MOST, STEP, price_weights, row_choices
from cusprun.vocabulary import VocabularyPrices

ROWS, REMOVABLE = 8192, 6144
BYTES_PER_TOKEN, OWN_BYTES_PER_TOKEN = 4.0, 3.0


def prices(nats: float, own: float = 0.0) -> VocabularyPrices:
    """Each removable row costs ``nats`` a byte, and ``own`` of new text of the scenario's."""
    note = {
        "weights": {"t": 1.0},
        "corpora": {"t": {"tokens": 1000, "bytes": 1000 * BYTES_PER_TOKEN}},
        "new_text": {"tokens": 1000, "bytes": 1000 * OWN_BYTES_PER_TOKEN} if own else None,
    }
    gone = np.arange(REMOVABLE + 1)
    order = np.arange(ROWS - REMOVABLE, ROWS)[::-1].copy()
    return VocabularyPrices(ROWS, order, nats * gone, 1.0, note, own * gone)


@pytest.fixture
def anatomy() -> Anatomy:
    return Anatomy(FAMILY, 64, 16, ROWS, (LayerWidths(256, 4, 2),) * 4, True, False, False)


def test_general_text_has_its_share_of_the_price_at_least() -> None:
    weights = price_weights({"language": 30, "domain": 60, "general": 10})
    assert weights == pytest.approx({"general": GENERAL_IN_PRICE, "language": 2 / 9, "domain": 4 / 9})
    assert price_weights({"domain": 50, "general": 50})["general"] == 0.5
    assert price_weights({"domain": 3, "task": 1}) == {"domain": 0.75, "task": 0.25}
    assert price_weights({"general": 7}) == {"general": 1.0}


def test_weighed_rows_come_in_steps_down_to_those_that_have_to_stay(anatomy: Anatomy) -> None:
    found = row_choices(prices(1e-6), anatomy, 0.25, None, True)
    assert [choice.rows for choice in found] == list(range(ROWS, ROWS - REMOVABLE - 1, -STEP))
    losses = [choice.loss for choice in found]
    assert losses == pytest.approx([(ROWS - choice.rows) * 1e-6 * BYTES_PER_TOKEN for choice in found])


def test_rows_cost_what_the_dearer_of_all_text_and_the_scenarios_own_takes(anatomy: Anatomy) -> None:
    dear, cheap = 3e-6 * OWN_BYTES_PER_TOKEN, 1e-6 * BYTES_PER_TOKEN
    for found, nats in ((prices(1e-6, 3e-6), dear), (prices(1e-6, 1.2e-6), cheap)):  # 1.2 a byte are less a token
        losses = [choice.loss for choice in row_choices(found, anatomy, 0.25, None, True)]
        assert losses == pytest.approx([number * STEP * nats for number in range(len(losses))])
    (only,) = row_choices(prices(0.0, 0.999 * AUTO_NATS / OWN_BYTES_PER_TOKEN / 640), anatomy, 0.9, None, False)
    assert only.rows == ROWS - 640


def test_a_number_is_the_one_choice(anatomy: Anatomy) -> None:
    (only,) = row_choices(prices(1.0), anatomy, 0.25, 3000, True)
    assert only.rows == 3008  # the next multiple of 64
    assert only.loss == 0.0


def test_rows_that_nothing_is_weighed_against_stop_at_their_price_or_at_a_share(anatomy: Anatomy) -> None:
    (dear,) = row_choices(prices(AUTO_NATS / BYTES_PER_TOKEN / 640), anatomy, 0.9, None, False)
    assert dear.rows == ROWS - 640
    (cheap,) = row_choices(prices(0.0), anatomy, 0.1, None, False)
    removed = anatomy.parameters - anatomy.with_vocabulary(cheap.rows).parameters
    assert removed <= MOST * 0.1 * anatomy.parameters
    assert removed >= MOST * 0.1 * anatomy.parameters - 64 * 64
    (unbounded,) = row_choices(prices(0.0), anatomy, None, None, False)
    assert unbounded.rows == ROWS - REMOVABLE
