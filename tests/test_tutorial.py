"""The tutorial as a newcomer follows it: every line typed as it stands, in one shell, up to an answer in the browser.

The folder holds what a fresh copy of the repository has. Installing is done by the tutorial's own command; the packages
that it would fetch and compile are those this interpreter has, so that it takes seconds and not minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from tests.chromium import open_chromium

pytestmark = [pytest.mark.slow, pytest.mark.browser]
ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
REPOSITORY = (".ci", "benchmarks", "cusprun", "deploy", "exporters", "constraints.txt", "pyproject.toml", "README.md",
              "LICENSE")  # fmt: skip
MARK = "--- the block is done ---"


class Shell:
    """One bash for all blocks; what they print comes as a terminal would show it."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
        environment.pop("VIRTUAL_ENV", None)
        self._process = subprocess.Popen(
            ["bash", "-e"], cwd=folder, env=environment, text=True, bufsize=1, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._lines: Queue[str | None] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def type(self, block: str, seconds: float = 600) -> list[str]:
        """The lines that a block prints. Fails where one of its commands does."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{\n{block}\n}} < /dev/null\necho '{MARK}'\n")
        self._process.stdin.flush()
        end = time.monotonic() + seconds
        printed: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.1, end - time.monotonic()))
            except Empty:
                pytest.fail(f"still running after {seconds:.0f} s:\n{block}\n" + "\n".join(printed[-40:]))
            if line is None:
                pytest.fail(f"this failed:\n{block}\n" + "\n".join(printed[-40:]))
            if line == MARK:
                return printed
            printed.append(line)

    def close(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        self._process.wait(30)


def read_blocks(text: str) -> list[tuple[str, str | None]]:
    """What is typed, in order, each with what the page shows as printed by it."""
    found: list[tuple[str, str | None]] = []
    for kind, block in re.findall(r"^```(bash|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind == "bash":
            found.append((block.rstrip(), None))
        else:
            found[-1] = (found[-1][0], block)
    return found


def like(line: str) -> str:
    """A line without its hashes, figures, spaces and rules."""
    line = re.sub(r"\b(sha256|digest) [0-9a-f.]+", r"\1 #", line)
    return " ".join(re.sub(r"\d[\d.,]*", "#", line).replace("─", "").split())


def assert_printed(shown: str, printed: list[str]) -> None:
    """Every line shown was printed, in that order, figures aside; `...` stands for any lines."""
    left = iter([like(line) for line in printed])
    for line in map(like, shown.splitlines()):
        if line not in ("", "..."):
            assert line in left, f"the tutorial shows {line!r}; printed was:\n" + "\n".join(printed)


def repository() -> Path:
    """Where the sources stand: beside the tests, or where .ci/test puts them when it tests the wheel."""
    return ROOT if (ROOT / ".ci" / "setup").is_file() else ROOT / "sources"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer") / "cusprun"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in REPOSITORY:
        source = repository() / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (site,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages_of_the_tests.pth").write_text("\n".join(here) + "\n")
    return folder


@pytest.fixture
def shell(checkout: Path) -> Iterator[Shell]:
    opened = Shell(checkout)
    yield opened
    opened.close()


def wait_for(url: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_the_tutorial_as_written(shell: Shell, checkout: Path) -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = read_blocks(text)
    (url,) = set(re.findall(r"http://(?:localhost|127\.0\.0\.1):\d+/?", text))
    (question,) = re.findall(r"^> (.+\?)$", text, re.MULTILINE)
    assert sum(shown is not None for _block, shown in blocks) >= 4
    opened = False
    for block, shown in blocks:
        printed = shell.type(block)
        if "serve --browser" in block:
            wait_for(url)
            printed += shell.type(":")  # what it says once it answers
            answer_in_browser(url, question)
            opened = True
        if shown is not None:
            assert_printed(shown, printed)
    assert opened
    program = checkout / ".venv" / "bin" / "cusprun-edge"
    assert program.is_file(), "the tutorial's own command installs what its other commands run"


def answer_in_browser(url: str, question: str) -> None:
    """The page loads the model, is asked the question and answers in words; nothing comes from anywhere else."""
    with open_chromium() as browser:
        page: Any = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.locator("#send:enabled, #problem:visible").first.wait_for(timeout=120_000)
        assert not page.locator("#problem:visible").count(), page.locator("#problem-text").text_content()
        page.get_by_label("Your question").fill(question)
        page.get_by_role("button", name="Send").click()
        page.locator(".answered").wait_for(timeout=300_000)
        said = page.locator(".answered > p:not(.note)").last.text_content()
        assert len(re.findall(r"[A-Za-z]{2,}", said)) >= 5, said
        assert float(page.locator("#speed").text_content().split()[0]) > 0
        assert [one for one in asked if not one.startswith((url, f"blob:{url}"))] == []


def test_what_the_page_shows_is_compared() -> None:
    printed = ["reading text: 3.2 s", "first/gguf/first-q4_0.gguf  81.5 MiB", "done"]
    assert_printed("...\nfirst/gguf/first-q4_0.gguf  80.1 MiB\n", printed)
    for wrong in ("first/gguf/second-q4_0.gguf  81.5 MiB\n", "done\nreading text: 3.2 s\n"):
        with pytest.raises(AssertionError, match="the tutorial shows"):
            assert_printed(wrong, printed)
