"""What the shell offers at a press of Tab: asked as typer's scripts ask, and in the shells themselves."""

from __future__ import annotations

import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from cusprun.cli import app
from cusprun.completion import ASKED, rejoin_words

Ask = Callable[..., list[str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What bash is offered for the last of some words, which it splits at `=`."""

    def asked(*words: str) -> list[str]:
        monkeypatch.setenv(ASKED, "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["cusprun-edge", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        rejoin_words(os.environ)
        with pytest.raises(SystemExit):
            app(prog_name="cusprun-edge", standalone_mode=False)
        return capsys.readouterr().out.split()

    return asked


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["build", "--lang", ""], ["en", "de", "fr", "es", "it", "pt"]),
        (["build", "--lang", "=", "e"], ["en", "es"]),
        (["build", "--lang", "="], ["en", "de", "fr", "es", "it", "pt"]),
        (["build", "--lang", "=", "de", "--domain", "=", "l"], ["legal"]),
        (["build", "--lang", "=", "de", "--task", "q"], ["qa"]),
        (["prune", "smol"], ["smollm2-135m-instruct"]),
        (["prune", "x", "--method", "short"], ["shortgpt"]),
        (["build", "--quant", "q8_0,q4_"], ["q8_0,q4_k_m", "q8_0,q4_1", "q8_0,q4_0"]),
        (["build", "--quant", "int4,i"], ["int4,iq4_nl", "int4,iq4_xs", "int4,iq3_m", "int4,iq2_m", "int4,int8"]),
        (["build", "--format", "gguf,"], ["gguf,onnx"]),
        (["build", "--block-size", ""], ["32", "128"]),
        (["export", "x", "--rounding", "g"], ["gptq"]),
        (["compare", "x", "--quant", "a"], ["auto", "all"]),
        (["bench", "x", "--device", ""], ["cpu", "cuda"]),
        (["eval", "x", "--score", "s"], ["second-half"]),
        (["corpora", "show", "tort"], ["tort-law-qa"]),
        (["corpora", "p"], ["pull"]),
        (["build", "--include", "tort"], ["tort-law-qa"]),
        (["build", "--zero"], ["--zero-points"]),
        (["build", "--corpus", "con"], []),  # the shell offers files
        (["build", "--dim", "style", "=", "l"], []),
    ],
)
def test_what_is_offered(ask: Ask, line: list[str], offered: list[str]) -> None:
    assert ask(*line) == offered


def test_every_flag_with_a_closed_set_of_values_offers_them(ask: Ask) -> None:
    from cusprun.recipe import Recipe

    def closed(annotation: Any) -> list[str]:
        return [v for part in get_args(annotation) for v in (closed(part) or [str(part)] * isinstance(part, str | int))]

    found = {name: closed(field.annotation) for name, field in Recipe.model_fields.items()}
    found = {name: values for name, values in found.items() if values}
    assert {"method", "rounding", "recover", "quant", "device", "layout"} <= set(found)
    for name, values in found.items():
        assert sorted(ask("build", "--" + name.replace("_", "-"), "")) == sorted(values), name


def test_entries_are_those_of_the_catalog(ask: Ask) -> None:
    from cusprun.corpora.catalog import load_catalog

    assert ask("corpora", "show", "") == [entry.name for entry in load_catalog()]


def test_models_of_the_hubs_cache_and_experts_nearby(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "models--some--model").mkdir(parents=True)
    for folder in ("experts/en-legal", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "expert.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert ask("build", "--model", "") == ["smollm2-135m-instruct", "some/model"]
    assert ask("chat", "") == ["experts/en-legal", "mine"]
    assert ask("bench", "mine", "--against", "exp") == ["experts/en-legal"]


@pytest.mark.parametrize(
    ("words", "asked", "joined", "now"),
    [
        (["p", "--a", "=", "b", "c"], 4, ["p", "--a=b", "c"], 2),
        (["p", "--a", "="], 2, ["p", "--a="], 1),
        (["p", "--a", "=", "b"], 3, ["p", "--a=b"], 1),
        (["p", "--d", "x", "=", "f", "--a", "=", "b"], 7, ["p", "--d", "x=f", "--a=b"], 3),
        (["p", "--a", "b"], 2, ["p", "--a", "b"], 2),
    ],
)
def test_words_that_bash_split_at_equals_signs(words: list[str], asked: int, joined: list[str], now: int) -> None:
    environment = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(asked)}
    rejoin_words(environment)
    assert environment == {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(now)}


def shell_environment(**more: str) -> dict[str, str]:
    """With the program that is tested first in PATH."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), **more}


def test_it_answers_before_a_typist_waits() -> None:
    """Processor time of the slowest kinds: the catalog's entries, and what the recipe allows."""
    for words in ("cusprun-edge\nbuild\n--include\nt", "cusprun-edge\nbuild\n--method\nr"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            ["cusprun-edge"], capture_output=True, text=True, check=True,
            env=shell_environment(**{ASKED: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}),
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.strip()
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def typed(command: list[str], keys: str) -> str:
    """What an interactive shell shows while these keys are pressed, the last of which end it."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(command[0], command, shell_environment(TERM="dumb", INPUTRC="/dev/null", PS1="$ "))
    os.write(terminal, keys.encode())
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not piece:
            break
        shown += piece
    else:
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(terminal)
    return shown.decode(errors="replace")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_tab_in_bash() -> None:
    script = f"source <({ASKED}=source_bash cusprun-edge)\n"
    line = "cusprun-edge build --lang=d\t--domain leg\t--quant q8_0,iq4_n\t--form seq\t"
    shown = typed(["bash", "--norc", "--noprofile", "-i"], script + line + "\x01echo \x05\nexit\n")
    assert "\ncusprun-edge build --lang=de --domain legal --quant q8_0,iq4_nl --form sequential" in shown.replace(
        "\r", ""
    )


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_tab_in_fish() -> None:
    asked = "; ".join(
        f'complete -C "cusprun-edge build {end}"' for end in ("--lang=d", "--domain leg", "--quant f32,f1")
    )
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"{ASKED}=source_fish cusprun-edge | source; {asked}"],
        capture_output=True, text=True, check=True, env=shell_environment(),
    )  # fmt: skip
    offered = [line.split("\t") for line in done.stdout.splitlines() if line]
    assert [one[0] for one in offered] == ["--lang=de", "legal", "f32,f16"]
    assert offered[0][1] == "German"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_tab_in_zsh() -> None:
    script = f"autoload -Uz compinit; compinit -u -D; source <({ASKED}=source_zsh cusprun-edge); setopt no_beep\n"
    line = "cusprun-edge build --lang=d\t--domain leg\t--quant q8_0,iq4_n\t"
    shown = typed(["zsh", "-f", "-i"], script + line + "\x01echo \x05\nexit\n")
    assert "\ncusprun-edge build --lang=de --domain legal --quant q8_0,iq4_nl" in shown.replace("\r", "")
