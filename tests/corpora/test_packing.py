"""Rendering follows the model's conventions; windows are exact, balanced by weight and the same each time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cusprun.corpora.document import Document, WeightedDocument, fingerprint
from cusprun.corpora.packing import Piece, encode, pack_windows, render
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Message
from tests.pico import SENTENCES, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def document(entry: str, number: int, sentences: int = 12) -> Document:
    text = " ".join(SENTENCES[(number + step) % len(SENTENCES)] for step in range(sentences))
    return Document(f"{entry}/{number}", f"{text} {number}", entry, "en", "legal", None)


def asked(content: str, answer: str, system: str | None = None) -> Document:
    turns = (Message("user", content), Message("assistant", answer))
    turns = (Message("system", system), *turns) if system else turns
    return Document("qa/1", f"{content}\n\n{answer}", "qa", "en", "legal", "qa", turns)


def test_turns_go_through_the_chat_template(tokenizer: Any) -> None:
    text = render(asked("Who pays?", "The tenant."), tokenizer)
    assert text == "<|im_start|>user\nWho pays?<|im_end|>\n<|im_start|>assistant\nThe tenant.<|im_end|>\n"
    ids = encode(asked("Who pays?", "The tenant."), tokenizer)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(tokenizer.eos_token_id) == 2


def test_without_a_template_question_and_answer_are_joined(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, chat=False)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert render(asked("Who pays?", "The tenant."), plain) == "Who pays?\n\nThe tenant."
    assert encode(asked("Who pays?", "The tenant."), plain)[-1] == plain.eos_token_id


def test_a_template_without_system_turns_gets_one_question(tokenizer: Any) -> None:
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    text = render(asked("Who pays?", "The tenant.", system="You know the law."), strict)
    assert text == "user: You know the law.\n\nWho pays?\nassistant: The tenant.\n"


def test_windows_are_exact_and_the_same_each_time(tokenizer: Any) -> None:
    documents = [document("a", number) for number in range(60)]
    windows = pack_windows(documents, tokenizer, 3000, 128, seed=3)
    assert windows.shape == (3000 // 128, 128)
    assert windows.dtype == np.int64
    assert np.array_equal(windows, pack_windows(documents[::-1], tokenizer, 3000, 128, seed=3))
    assert not np.array_equal(windows, pack_windows(documents, tokenizer, 3000, 128, seed=4))
    assert windows.max() < len(tokenizer)


def test_no_entry_swamps_the_others(tokenizer: Any) -> None:
    large = [WeightedDocument(document("large", number), 0.5) for number in range(200)]
    small = [WeightedDocument(asked(f"Who pays? {number}", "The tenant."), 0.5) for number in range(400)]
    windows = pack_windows([*large, *small], tokenizer, 4096, 64, seed=0)
    share = np.isin(windows, tokenizer.convert_tokens_to_ids("<|im_start|>")).sum() * 20 / windows.size
    assert 0.25 < share < 0.75
    only_large = pack_windows([*large, *small[:2]], tokenizer, 4096, 64, seed=0)
    assert only_large.shape == windows.shape  # what the small entry cannot give goes to the large one


def windows_of(text: np.ndarray, length: int = 16) -> set[bytes]:
    """Every run of ``length`` tokens within a window."""
    return {row[start : start + length].tobytes() for row in text for start in range(len(row) - length + 1)}


def scrambled(number: int) -> Document:
    """A document that has no run of words with another one in common."""
    words = " ".join(SENTENCES).split()
    return Document(f"a/{number}", " ".join(random.Random(number).choices(words, k=80)), "a", "en", "legal", None)


def test_corpora_that_share_documents_take_different_ones(tokenizer: Any) -> None:
    documents = [scrambled(number) for number in range(80)]
    dealt: set[Piece] = set()
    first, second = (pack_windows(documents, tokenizer, 2048, 64, 0, dealt) for _ in range(2))
    assert not windows_of(first) & windows_of(second)
    assert np.array_equal(first, pack_windows(documents, tokenizer, 2048, 64, 0))


def test_what_others_took_comes_again_where_there_is_no_other_text(tokenizer: Any) -> None:
    documents = [scrambled(number) for number in range(40)]
    dealt: set[Piece] = set()
    first, second = (pack_windows(documents, tokenizer, 3000, 128, 3, dealt) for _ in range(2))
    assert first.shape == second.shape  # each takes more than half of the text
    both = windows_of(first) & windows_of(second)
    assert 0 < len(both) < len(windows_of(first))


def test_too_little_text_says_how_many_tokens_there_were(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"gives \d+ tokens, fewer than 4 windows of 512"):
        pack_windows([document("a", 1, 2)], tokenizer, 65536, 512, seed=0)
    with pytest.raises(InvalidRequest, match="--tokens 100"):
        pack_windows([document("a", 1)], tokenizer, 100, 512, seed=0)
    with pytest.raises(InvalidRequest, match="gives 0 tokens"):
        pack_windows([], tokenizer, 65536, 512, seed=0)


def test_the_fingerprint_follows_text_and_weights() -> None:
    one, other = document("a", 1), document("a", 2)
    assert fingerprint([one, other]) == fingerprint([one, other])
    assert fingerprint([one]) != fingerprint([other])
    assert fingerprint([WeightedDocument(one, 1.0)]) != fingerprint([WeightedDocument(one, 0.5)])


def test_shares_of_the_dimensions() -> None:
    from cusprun.corpora.document import Scenario
    from cusprun.corpora.selection import Selection

    scenario = Scenario("en", "legal", "qa")
    selection = Selection(scenario, (), {}, (), 16000, 128, 1, 0, general=0.25, weights={"domain": 2.0})
    shares = selection.shares(["language", "domain", "task", "general"])
    assert shares == {"language": 3000, "domain": 6000, "task": 3000, "general": 4000}
    assert selection.shares(["general"]) == {"general": 16000}  # no dimension: all of it
    few = Selection(scenario, (), {}, (), 2048, 128, 1, 0, general=0.01).shares(["language", "general"])
    assert few["general"] == 4 * 128
