"""Fixtures that several rooms share."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO

import pytest

from tests import pico

WORDS = sorted({word for sentence in pico.SENTENCES for word in sentence.split()})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that run alone first, then those with slow ones: what is left at the end is short."""
    files: dict[Path, tuple[bool, bool]] = {}
    for item in items:
        alone, slow = files.get(item.path, (False, False))
        files[item.path] = (alone or is_alone(item), slow or item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: files[item.path], reverse=True)


def is_alone(item: pytest.Item | None) -> bool:
    """Whether no other test may run beside this one."""
    return item is not None and item.get_closest_marker("alone") is not None


class Turn:
    """A worker's right to run a test, among those of one run of pytest: shared by all, or one worker's alone."""

    def __init__(self, run: str) -> None:
        self._name = Path(tempfile.gettempdir()) / f"cusprun-tests-{run}"
        self._held: IO[str] | None = None

    def take(self, alone: bool) -> None:
        """Waits until it may be had; whoever waits to be alone holds back those that come after."""
        import fcntl

        if self._held:
            return
        lock = self._name.with_suffix(".lock").open("w")
        with self._name.with_suffix(".turn").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        self._held = lock

    def give_back(self) -> None:
        """Lets the others begin."""
        if self._held:
            self._held.close()
            self._held = None


TURN = pytest.StashKey[Turn]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Where tests run side by side, those marked ``alone`` wait for the others and let none begin before the last."""
    worker = getattr(item.config, "workerinput", None)
    if worker is None:
        return (yield)
    turn = item.config.stash.setdefault(TURN, Turn(worker["testrunuid"]))
    turn.take(is_alone(item))
    try:
        return (yield)
    finally:
        if not (is_alone(item) and is_alone(nextitem)):
            turn.give_back()


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
