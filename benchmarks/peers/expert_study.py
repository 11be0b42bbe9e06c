"""What the studies of one build's expert and its dense model share: folders, a record that goes on, command lines."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cusprun.benchmarks.environment import environment
from cusprun.corpora.cache import cache_folder
from cusprun.dense import Dense, find_dense
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import sha256_tree, write_json
from cusprun.progress import say


class ExpertStudy:
    """An expert and its dense model, a work folder for artifacts of the two, and what was measured of them so far."""

    def __init__(
        self, module: str, options: argparse.Namespace, settings: dict[str, Any], parts: tuple[str, ...]
    ) -> None:
        self.expert: Path = options.expert
        card = json.loads((self.expert / "expert.json").read_text(encoding="utf-8"))
        self.options = options
        self.dense: Dense = find_dense(card["base"]["id"])
        self.folders = {"dense": self.dense.folder, "expert": self.expert / "model"}
        identity = "".join([sha256_tree(self.folders["expert"]), self.dense.key])
        self.work: Path = options.work / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._path: Path = options.out.with_suffix(".json")
        settings = {
            "expert": str(card["name"]), "base": card["base"]["id"],
            "removed": 1 - card["expert"]["parameters"] / card["base"]["parameters"],
            "identity": self.work.name, "threads": options.threads, **settings,
        }  # fmt: skip
        self.found: dict[str, Any] = {"settings": settings, **{part: {} for part in parts}}
        if self._path.is_file():
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            if saved["settings"] == settings:
                self.found = saved
        self.found["environment"] = environment()
        self.found["command"] = " ".join([f"python -m {module}", *given_words()])

    def save(self) -> None:
        """Writes the record."""
        write_json(self._path, self.found)


def given_words() -> list[str]:
    """The command line without the places of its page and its work folder; of a whole path the last name."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    for flag in ("--out", "--work"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    return words


def run_study(name: str, parser: argparse.ArgumentParser, out: Path, run: Callable[[argparse.Namespace], None]) -> None:
    """Reads the command line and runs the study. Exits with its message where something is wrong."""
    parser.add_argument("expert", type=Path, help="folder of a build")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=cache_folder() / "studies" / "exports")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    if not (options.expert / "expert.json").is_file():
        raise SystemExit(f"{options.expert} holds no expert.json: name the folder that a build left")
    try:
        run(options)
    except (InvalidRequest, Failed) as error:
        raise SystemExit(f"{name}: {error}") from error
    say(f"written: {options.out}.json, .csv, .md")
