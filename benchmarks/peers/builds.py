"""Builds of one scenario in one folder, one after the other: they share text, losses and all that is kept of them."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cusprun.corpora.cache import cache_folder
from cusprun.errors import Failed
from cusprun.recipe import DEFAULT_MODEL

Wish = Mapping[str, str | float]  # further flags of build


class Builds:
    """Runs `cusprun-edge build` with the flags of a command line and further ones."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.options = options
        self.out: Path = options.work / name

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Model, scenario or text, tokens, threads and the work folder."""
        parser.add_argument("--model", default=DEFAULT_MODEL)
        parser.add_argument("--lang")
        parser.add_argument("--domain")
        parser.add_argument("--task")
        parser.add_argument("--corpus", help="the user's own text instead of a scenario")
        parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
        parser.add_argument("--repetitions", type=int, default=5)
        parser.add_argument("--threads", type=int)
        parser.add_argument("--work", type=Path, default=cache_folder() / "studies")

    @staticmethod
    def read_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
        """What was given; en-legal-qa where no scenario or text was."""
        options = parser.parse_args()
        if not (options.lang or options.domain or options.task or options.corpus):
            options.lang, options.domain, options.task = "en", "legal", "qa"
        return options

    def settings(self) -> dict[str, Any]:
        """What every figure hangs on."""
        names = ("model", "lang", "domain", "task", "corpus", "tokens", "repetitions", "threads")
        return {name: getattr(self.options, name) for name in names}

    def build(self, wish: Wish) -> dict[str, Any]:
        """The expert with the flags of ``wish``, unmeasured; its expert.json.

        Raises Failed with what the command line said.
        """
        if self.out.is_dir():  # of the build before, whose stages stay
            for path in self.out.iterdir():
                if path.name != ".stages":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        options = self.options
        given = {name: getattr(options, name) for name in ("model", "lang", "domain", "task", "corpus", "tokens")}
        given |= {"threads": options.threads, **wish}
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "cusprun.cli", "build", *words, "--no-measure", "--json"]
        done = subprocess.run([*command, "--out", str(self.out)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise Failed(f"build {as_words(wish)} ended with {done.returncode}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def as_words(wish: Wish) -> str:
    """Flags as on a command line."""
    return " ".join(f"--{name} {value}" for name, value in wish.items())
