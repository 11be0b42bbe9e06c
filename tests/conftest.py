"""Fixtures that several rooms share."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from tests import pico

WORDS = sorted({word for sentence in pico.SENTENCES for word in sentence.split()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where tests run side by side, one marked ``alone`` waits for the others and lets none begin before it is done."""
    worker = getattr(item.config, "workerinput", None)
    if worker is None:
        return (yield)
    import fcntl

    name = Path(tempfile.gettempdir()) / f"cusprun-tests-{worker['testrunuid']}"
    with name.with_suffix(".turn").open("w") as turn, name.with_suffix(".lock").open("w") as lock:
        fcntl.flock(turn, fcntl.LOCK_EX)  # whoever waits to be alone holds back those that come after
        alone = item.get_closest_marker("alone") is not None
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


def write_text(path: Path, sentences: int, seed: int) -> Path:
    """A text of random sentences out of the tokenizer's words, in paragraphs; no two are alike."""
    chance = random.Random(seed)
    paragraphs = []
    for _ in range(sentences // 8):
        lines = [" ".join(chance.choices(WORDS, k=chance.randint(8, 20))) + "." for _ in range(8)]
        paragraphs.append(" ".join(lines))
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pico_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with GQA and tied embeddings."""
    return pico.save_model(tmp_path_factory.mktemp("pico") / "pico-llama")


@pytest.fixture(scope="session")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's text file, long enough for calibration and held-out windows of 64 tokens."""
    return write_text(tmp_path_factory.mktemp("text") / "contracts.txt", sentences=1600, seed=7)
