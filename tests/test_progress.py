"""What is said of long work where stderr is no terminal, and on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cusprun import progress
from cusprun.benchmarks import pace


class Clock:
    """A clock that each item moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def items(self, count: int, seconds: float) -> Iterator[int]:
        for item in range(count):
            yield item
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(pace, "time", found)
    return found


def test_long_work_tells_how_far_it_is_and_what_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(clock.items(8, 20), "work", total=8)) == list(range(8))
    assert capsys.readouterr().err.splitlines() == [
        "work: 2 of 8, 2 min left", "work: 4 of 8, 80 s left", "work: 6 of 8, 40 s left", "work: 160.0 s",
    ]  # fmt: skip


def test_work_of_unknown_length_tells_how_much_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    list(progress.track(clock.items(3, 31), "work"))
    assert capsys.readouterr().err.splitlines() == ["work: 1", "work: 2", "work: 93.0 s"]


def test_short_work_ends_in_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    list(progress.track(clock.items(100, 0.1), "work", total=100))
    assert capsys.readouterr().err == "work: 10.0 s\n"


def test_a_bench_tells_what_is_left_from_its_first_round_on(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pace.shown("speed") as show:
        for done in (40, 80):
            clock.now += 40
            show(done, 200.0 - done, "first round")
    assert capsys.readouterr().err.splitlines() == [
        "speed: first round, 3 min left", "speed: first round, 2 min left", "speed: 80.0 s",
    ]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_on_a_terminal_there_is_a_bar_with_the_time_that_is_left() -> None:
    import pty

    script = "import time\nfrom cusprun.progress import track\nfor _ in track(range(20), 'work', 20): time.sleep(0.1)"
    leader, follower = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", script], stderr=follower, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    said = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    os.close(leader)
    assert child.wait() == 0
    text = said.decode(errors="replace")
    assert re.search(r"\d+/20", text)
    assert re.search(r"0:00:0[0-3]", text)
