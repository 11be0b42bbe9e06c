"""The command line as a reader of README and --help meets it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cusprun.cli import app
from cusprun.manual import SECTIONS, example_of

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    "build",
    "prune",
    "export",
    "bench",
    "eval",
    "report",
    "chat",
    "run",
    "serve",
    "inspect",
    "corpora list",
    "corpora pull",
    "corpora show",
)


@lru_cache
def help_of(command: str) -> str:
    arguments = [sys.executable, "-m", "cusprun.cli", *command.split(), "--help"]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_of_itself(command: str) -> None:
    assert f"Example: cusprun-edge {command}" in " ".join(help_of(command).split())


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its words, as the command line knows it."""
    root: Any = get_command(app)
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {second}", leaf) for second, leaf in inner.items())


ALL = dict(commands())


def help_at(words: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The help of a command ("" for the whole) on a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    command: Any = get_command(app)
    context = command.make_context("cusprun-edge", [], resilient_parsing=True)
    for word in words.split():
        command = command.commands[word]
        context = command.make_context(word, [], parent=context, resilient_parsing=True)
    found: str = command.get_help(context)
    return found


@pytest.mark.parametrize("words", ALL)
def test_the_example_of_a_command_is_one(words: str) -> None:
    """The parser takes it as it stands: every flag exists and every value is of its type."""
    example = example_of(ALL[words].callback.__doc__)
    assert example.startswith(f"cusprun-edge {words}")
    ALL[words].make_context(words, shlex.split(example)[1 + len(words.split()) :])


@pytest.mark.parametrize("words", ALL)
def test_the_example_can_be_copied_from_the_help(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 100):
        text = help_at(words, columns, monkeypatch)
        shown = re.search(r"^  Example:\n((?:    .*\n?)+)", text, re.MULTILINE)
        assert shown is not None
        assert shlex.split(shown[1].replace("\\\n", " ")) == shlex.split(example_of(ALL[words].callback.__doc__))


@pytest.mark.parametrize("words", ALL)
def test_every_parameter_and_exit_code_is_explained(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unexplained = [parameter.name for parameter in ALL[words].params if not parameter.help]
    assert not unexplained
    assert "Exit codes: 0 done; 1" in help_at(words, 100, monkeypatch)
    first = ALL[words].callback.__doc__.partition("\n")[0]
    assert first.endswith(".")
    assert first[0].isupper()


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_help_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("", "corpora", *ALL):
        text = help_at(words, columns, monkeypatch).partition("  Example:")
        lines = (text[0] + text[2].partition("\n\n")[2]).splitlines()
        assert max(map(len, lines)) <= columns, words
    assert max(len(line) for line in help_at("build", 100, monkeypatch).splitlines()) > 80


def test_commands_are_listed_in_the_order_of_work_with_their_first_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(help_at("", 80, monkeypatch).split())
    root: Any = get_command(app)
    order = [name for names in SECTIONS.values() for name in names if name in root.commands]
    assert sorted(order) == sorted(root.commands), "cusprun/manual.py names every command in a section"
    places = []
    for name in order:
        about = root.commands[name].help.split("\n\n")[0]
        sentence = " ".join(re.split(r"\.\s", about.strip())[0].split()).rstrip(".")
        assert f" {name} {sentence}" in text
        places.append(text.index(f" {name} {sentence}"))
    assert places == sorted(places)


@pytest.mark.parametrize("words", ["build", "prune"])
def test_flags_of_a_recipe_stand_by_subject(words: str) -> None:
    from cusprun.flags import SUBJECTS

    found = [name for names in SUBJECTS.values() for name in names]
    assert len(found) == len(set(found))
    assert {parameter.name for parameter in ALL[words].params} - {"help", "model"} <= set(found)


def test_help_reaches_for_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv[1:] = ['build', '--help']; import cusprun.cli as cli; cli._run(cli.app); "
        "sys.exit(str(sorted({'torch', 'transformers', 'numpy', 'onnxruntime', 'llama_cpp'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def readme_lines() -> list[str]:
    found = re.findall(
        r"cusprun-edge ((?:build|prune|export|bench|eval|report|chat|run|serve|inspect)\b[^\n`]*)", README
    )
    assert len(found) >= 6
    return found


@pytest.mark.parametrize("line", readme_lines())
def test_flags_that_readme_shows_exist(line: str) -> None:
    command = line.split()[0]
    for flag in re.findall(r"--[a-z-]+", line):
        assert re.search(rf"{flag}\b", help_of(command)), f"{command} has no {flag}"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_two_names(flag: str) -> None:
    done = subprocess.run([sys.executable, "-m", "cusprun.cli", flag], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage:")


def test_version() -> None:
    import cusprun

    done = subprocess.run(
        [sys.executable, "-m", "cusprun.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cusprun-edge {cusprun.__version__}\n"


def test_inspect_prints_one_json_document(pico_model: Path) -> None:
    import json

    arguments = [sys.executable, "-m", "cusprun.cli", "inspect", str(pico_model), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["family"] == "llama"
    assert found["layers"][2] == {
        "layer": 2, "ffn": 128, "heads": 4, "kv_heads": 2, "rotates": True, "window": None, "theta": None
    }  # fmt: skip


def test_rooms_import_downward_only() -> None:
    """cusprun/ knows nothing of exporters, deploy and benchmarks, but for cli and build; the latter two keep apart."""
    import cusprun
    import cusprun.benchmarks
    import cusprun.deploy

    rooms = {
        "library": (
            Path(cusprun.__file__).parent,
            r"cusprun\.(exporters|deploy|benchmarks)",
            {"cli.py", "cli_measure.py", "cli_serve.py", "cli_ship.py", "completion.py", "build.py", "doctor"},
        ),
        "benchmarks": (Path(cusprun.benchmarks.__file__).parent, r"cusprun\.(deploy|build|cli)\b", set()),
        "deploy": (Path(cusprun.deploy.__file__).parent, r"cusprun\.(benchmarks|build|cli)\b", set()),
    }
    for folder, forbidden, excepted in rooms.values():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if {path.name, inside[0]} & excepted or (
                folder.name == "cusprun" and inside[0] in ("exporters", "deploy", "benchmarks")
            ):
                continue
            found = re.findall(rf"^\s*(?:from|import) {forbidden}", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not found, f"{path} imports upward: {found}"
