"""`run` as a user has it, and the options of `chat` and `serve` that need no server."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from cusprun.deploy.run import run
from cusprun.deploy.serve.stop import StopText
from cusprun.errors import InvalidRequest
from cusprun.runtimes import Sampling, open_runtime
from tests.deploy.serving import COMMAND, small_gguf

PROMPT = "The tenant shall"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gguf(tmp_path_factory.mktemp("run"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(gguf: Path) -> str:
    runtime = open_runtime(gguf, threads=1)
    found = runtime.decode(list(runtime.generate(runtime.encode(PROMPT), Sampling(max_tokens=12)))) + "\n"
    runtime.close()
    return found


@pytest.mark.parametrize(("argument", "piped"), [([PROMPT], b"not this"), ([], f"{PROMPT}\n".encode())])
def test_run_continues_an_argument_or_a_pipe(gguf: Path, expected: str, argument: list[str], piped: bytes) -> None:
    command = [*COMMAND, "run", str(gguf), *argument, "--max-tokens", "12", "--threads", "1"]
    done = subprocess.run(command, input=piped, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == expected


def test_chat_once_with_a_system_prompt_by_the_command_line(gguf: Path) -> None:
    def once(*options: str) -> str:
        command = [*COMMAND, "chat", str(gguf), "--once", "Who pays?", "--max-tokens", "12", *options]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout

    assert once("--system", "Der Vermieter.") != once()


def test_prompts_that_make_no_sense(gguf: Path) -> None:
    with pytest.raises(InvalidRequest, match="write a prompt"):
        run(gguf, "", stream=io.StringIO())
    with pytest.raises(InvalidRequest, match="shorten"):
        run(gguf, "rent " * 600, stream=io.StringIO())


def test_serve_without_its_packages(gguf: Path) -> None:
    """Packages that are not there, as Python sees it: a None in sys.modules is a failed import."""
    hide = "import sys, importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda n, *a: None if n == 'starlette' else f(n, *a); sys.modules['starlette'] = None; "
    code = f"{hide}sys.argv = ['cusprun-edge', 'serve', {str(gguf)!r}]; from cusprun.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("cusprun-edge: serve needs the package starlette: pip install 'cusprun[serve]'\n")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("stops", [["END"], ["aab"], ["ab", "XY"], ["never"], []])
def test_stop_strings_over_all_cuts(size: int, stops: list[str]) -> None:
    for text in (
        "no such thing",
        "some text END and more END",
        "aaaaab rest",
        "EN EEND",
        "abXY",
        "ends in EN",
        "ends in nev",
    ):
        cuts = [text.index(stop) for stop in stops if stop in text]
        expected = text[: min(cuts, default=len(text))]
        stream, shown = StopText(stops), ""
        for at in range(0, len(text), size):
            shown += stream.feed(text[at : at + size])
            assert expected.startswith(shown)  # nothing of a stop string, at no time
        assert shown + stream.flush() == expected
        assert stream.hit == bool(cuts)
        assert stream.released == len(expected)
