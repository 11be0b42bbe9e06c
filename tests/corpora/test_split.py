"""Near-duplicates stay together, sides never change, and nothing held out is ever calibrated on."""

from __future__ import annotations

import random

import numpy as np

from cusprun.corpora.document import Document, Question
from cusprun.corpora.library import Shelf, without_leaks
from cusprun.corpora.split import HELD_OUT, THRESHOLD, Side, assign_sides, sign, similarity

WORDS = [f"word{number}" for number in range(900)]


def made_text(seed: int, words: int = 120) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(words))


def changed(text: str, seed: int, words: int = 3) -> str:
    """The text with a few words replaced: a near-duplicate."""
    chance = random.Random(seed)
    pieces = text.split()
    for place in chance.sample(range(len(pieces)), words):
        pieces[place] = "other"
    return " ".join(pieces)


def shelf(texts: list[str], name: str = "entry", family: str = "", questions: list[Question] | None = None) -> Shelf:
    documents = tuple(
        Document(f"{name}/{n}", text, name, "en", "legal", None, question=questions[n] if questions else None)
        for n, text in enumerate(texts)
    )
    signatures = sign(texts)
    sides: list[Side] = assign_sides(documents, [f"{n}" for n in range(len(texts))], signatures, family)
    return Shelf(name, documents, tuple(sides), signatures)


def made_family(seed: int) -> list[str]:
    """Unrelated texts with up to two near-duplicates each, shuffled."""
    chance = random.Random(seed)
    texts = []
    for number in range(40):
        text = made_text(1000 * seed + number)
        texts += [text, *(changed(text, copy) for copy in range(chance.randrange(3)))]
    chance.shuffle(texts)
    return texts


def test_no_near_duplicates_lie_across_the_sides() -> None:
    for seed in range(3):
        made = shelf(made_family(seed))
        held, kept = made.numbers("held-out"), made.numbers("calibration")
        assert held
        assert kept
        for one in held:
            for other in kept:
                assert similarity(made.signatures[one], made.signatures[other]) < THRESHOLD


def test_adding_documents_moves_none_that_were_there() -> None:
    texts = made_family(7)
    for count in range(5, len(texts), 9):
        assert shelf(texts[:count]).sides == shelf(texts).sides[:count]


def test_sides_are_a_function_of_the_text_alone() -> None:
    texts = [made_text(number) for number in range(300)]
    first = dict(zip(texts, shelf(texts).sides, strict=True))
    shuffled = random.Random(1).sample(texts, len(texts))
    assert dict(zip(shuffled, shelf(shuffled, name="other").sides, strict=True)) == first
    assert abs(sum(side == "held-out" for side in first.values()) / 300 - HELD_OUT) < 0.08


def test_exact_duplicates_and_other_spellings_stay_together() -> None:
    made = shelf(
        [made_text(number) for number in range(20)] + [made_text(number).upper() + "!" for number in range(20)]
    )
    assert made.sides[:20] == made.sides[20:]


def test_a_text_between_both_sides_is_dropped() -> None:
    """Each pair shares 60 % of its words, and both share 80 % with the text between."""
    bridges = []
    for number in range(40):
        words = made_text(number, 300).split()
        one, other, bridge = shelf([" ".join(words[:240]), " ".join(words[60:]), " ".join(words)]).sides
        if one != other:
            bridges.append(bridge)
    assert len(bridges) >= 5
    assert set(bridges) == {"dropped"}


def test_questions_with_one_prompt_stay_together_whatever_the_choices() -> None:
    prompt = "Which of these duties does a landlord owe to a tenant under the lease of a flat?"
    questions = [Question(prompt, (made_text(n, 40), made_text(n + 99, 40)), 0) for n in range(8)]
    made = shelf([f"{q.prompt} {' '.join(q.choices)}" for q in questions], questions=questions)
    assert len(set(made.sides)) == 1


def test_a_family_shares_sides_by_the_name_of_the_group() -> None:
    papers = shelf([made_text(number) for number in range(50)], "papers", "plos")
    abstracts = shelf([made_text(500 + number) for number in range(50)], "abstracts", "plos")
    assert papers.sides == abstracts.sides


def test_held_out_text_of_one_entry_is_taken_out_of_the_others() -> None:
    texts = [made_text(number) for number in range(60)]
    one = shelf(texts, "one")
    other = shelf([changed(text, 5) for text in texts], "other")
    kept = without_leaks([one, other], [])
    held = [signature for made in (one, other) for signature in made.signatures[made.numbers("held-out")]]
    for made in (one, other):
        numbers = {document.id: number for number, document in enumerate(made.documents)}
        for document in kept[made.name]:
            signature = made.signatures[numbers[document.id]]
            assert all(similarity(signature, other_signature) < THRESHOLD for other_signature in held)
    assert kept["one"]


def test_signatures_are_small_and_the_same_each_time() -> None:
    texts = [made_text(1), "", "two words"]
    assert np.array_equal(sign(texts), sign(texts))
    assert sign(texts).dtype == np.uint32
