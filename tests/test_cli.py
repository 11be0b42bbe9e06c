"""The command line as a reader of README and --help meets it."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

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
            {"cli.py", "cli_measure.py", "cli_serve.py", "build.py"},
        ),
        "benchmarks": (Path(cusprun.benchmarks.__file__).parent, r"cusprun\.(deploy|build|cli)\b", set()),
        "deploy": (Path(cusprun.deploy.__file__).parent, r"cusprun\.(benchmarks|build|cli)\b", set()),
    }
    for folder, forbidden, excepted in rooms.values():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if path.name in excepted or (
                folder.name == "cusprun" and inside[0] in ("exporters", "deploy", "benchmarks")
            ):
                continue
            found = re.findall(rf"^\s*(?:from|import) {forbidden}", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not found, f"{path} imports upward: {found}"
