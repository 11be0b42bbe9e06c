"""The chat as a user has it: a real process on a pico model, through pipes and through a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cusprun.deploy.chat import Conversation, chat, find_artifact
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes import Message, Sampling, open_runtime
from tests.pico import save_model

TALK = """
import sys
from pathlib import Path
from cusprun.deploy.chat import chat
from cusprun.runtimes import Sampling
chat(Path(sys.argv[1]), sampling=Sampling(max_tokens=int(sys.argv[2])), threads=1)
"""

STEERING = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
READY = ">\x08"  # the prompt, drawn up to where the cursor goes


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert's folder as ``build`` leaves it: model/, gguf/ with two files, expert.json."""
    folder = tmp_path_factory.mktemp("expert")
    model = save_model(folder / "model", num_hidden_layers=1)
    for quant in ("q8_0", "q4_0"):
        export_gguf(model, folder / "gguf" / f"pico-{quant}.gguf", quant)
    artifacts = [{"path": f"gguf/pico-{quant}.gguf", "format": "gguf"} for quant in ("q8_0", "q4_0")]
    (folder / "expert.json").write_text(json.dumps({"artifacts": artifacts}))
    return folder


def test_artifact_of_a_folder(expert: Path, tmp_path: Path) -> None:
    gguf = expert / "gguf" / "pico-q8_0.gguf"
    assert find_artifact(gguf) == gguf
    assert find_artifact(expert) == gguf  # listed first
    assert find_artifact(expert / "model") == expert / "model"
    assert find_artifact(expert / "gguf") == expert / "gguf" / "pico-q4_0.gguf"  # smallest
    (tmp_path / "model").symlink_to(expert / "model")
    assert find_artifact(tmp_path) == tmp_path / "model"
    (tmp_path / "expert.json").write_text(json.dumps({"artifacts": [{"path": str(gguf)}, {"path": "../x.gguf"}]}))
    assert find_artifact(tmp_path) == tmp_path / "model"  # nothing outside the folder


def test_artifacts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"model folder .*, a \.gguf file or an ONNX folder"):
        find_artifact(tmp_path)
    with pytest.raises(InvalidRequest, match="absent"):
        find_artifact(tmp_path / "absent")
    (tmp_path / "expert.json").write_text("[]")
    with pytest.raises(InvalidRequest, match=r"expert\.json is damaged"):
        find_artifact(tmp_path)


def expected_answer(artifact: Path, prompt: str, tokens: int) -> str:
    runtime = open_runtime(artifact, threads=1)
    ids = runtime.encode(runtime.chat_prompt([Message("user", prompt)]), special=True)
    return runtime.decode(list(runtime.generate(ids, Sampling(max_tokens=tokens))))


def test_one_prompt_through_a_pipe(expert: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TALK, str(expert), "20"], input=b"Wer zahlt die Miete?\n", capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == expected_answer(find_artifact(expert), "Wer zahlt die Miete?", 20) + "\n"


@pytest.mark.parametrize("name", ["model", "gguf/pico-q4_0.gguf"])
def test_once(expert: Path, name: str) -> None:
    out = io.StringIO()
    chat(expert / name, once="Who pays?", sampling=Sampling(max_tokens=8), threads=1, stream=out)
    assert out.getvalue() == expected_answer(expert / name, "Who pays?", 8) + "\n"


def test_no_prompt(expert: Path) -> None:
    with pytest.raises(InvalidRequest, match="no prompt"):
        chat(expert, input=io.StringIO("  \n"))


def test_prompt_longer_than_the_context(expert: Path) -> None:
    with pytest.raises(InvalidRequest, match="shorten"):
        chat(expert, once="rent " * 600, threads=1, stream=io.StringIO())


def test_oldest_turns_are_forgotten(expert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = open_runtime(find_artifact(expert), context=160, threads=1)
    conversation = Conversation(runtime, Sampling(max_tokens=30), "Be brief.")
    for number in range(6):
        "".join(conversation.answer(f"Question {number}: who pays the rent of the first month?"))
    assert "forgotten" in capsys.readouterr().err
    assert conversation.turns[-2].content.startswith("Question 5")
    assert not any(turn.content.startswith("Question 0") for turn in conversation.turns)
    assert [turn.role for turn in conversation.turns[:2]] == ["user", "assistant"]


class Terminal:
    """A process on a pseudo terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", TALK, *arguments]
        # Nobody here tells where the cursor is.
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(command, env=environment, preexec_fn=partial(os.login_tty, slave))
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Everything that was shown up to ``text``."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            self.seen = STEERING.sub("", self.seen + os.read(self.master, 4096).decode(errors="replace"))
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_talk_in_a_terminal(expert: Path) -> None:
    terminal = Terminal(str(expert), "400")
    try:
        terminal.until(READY)
        for wait in (0.3, 0.2, 0.1):
            terminal.type("Who pays?\r")
            terminal.until("Who pays?")  # the echo
            time.sleep(wait)
            terminal.type("\x03")  # ends the answer, or an empty line if the answer was quicker
            terminal.until(READY)
            time.sleep(0.5)  # where the answer was quicker, the emptied line is followed by another
        terminal.type("\x1b[A")  # arrow up: the question before
        terminal.until("Who pays?")
        terminal.type("\x03")  # an unfinished line is left
        terminal.until(READY)
        assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


def test_many_interruptions_at_once_end_no_conversation(expert: Path) -> None:
    terminal = Terminal(str(expert), "400")
    try:
        terminal.until(READY)
        for _ in range(3):
            terminal.type("Who pays?\r")
            for _ in range(8):
                time.sleep(0.003)
                terminal.type("\x03")
        time.sleep(0.3)
        assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
