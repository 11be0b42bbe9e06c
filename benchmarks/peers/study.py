"""A study as one command: its cells by the command line's choice, run, and its pages written after each.

    python -m cusprun.benchmarks.peers.<study> [--scenario S ...] [--ratio R ...] [--method M ...] [--only GLOB ...]

An interrupted study goes on where it stopped; the pages show what there is and name what was not run yet.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cusprun.benchmarks.peers.grid import Also, Cell, Grid, Setup, read_study
from cusprun.benchmarks.peers.scenes import SCENES, Scene, find_scenes, own_scene
from cusprun.benchmarks.peers.study_page import Picture, Row, as_row, write_pages
from cusprun.corpora.cache import cache_folder
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import sha256_file
from cusprun.progress import say
from cusprun.recipe import DEFAULT_MODEL, WINDOW

TOKENS = 65536  # more than a build's default, which has to be done in ten minutes
EVAL_TOKENS = 12288
FILTERS = ("scenario", "ratio", "method")


@dataclass(frozen=True)
class Study:
    """What a study compares and how it is told."""

    name: str  # of its module and its files
    title: str
    about: str  # one paragraph: what is varied, what is held fixed
    cells: Callable[[Sequence[Scene], int], list[Cell]]  # of scenes and the calibration tokens
    groups: tuple[str, ...]  # labels that split the rows into tables
    columns: tuple[str, ...]  # labels that tell a table's rows apart
    sentences: Callable[[Sequence[Row]], list[str]]
    picture: Picture
    scenes: tuple[Scene, ...] = SCENES
    questions: int = 0
    also: Also | None = None
    more: Callable[[Grid, argparse.Namespace], tuple[dict[str, Any], list[str]]] | None = None  # JSON and lines
    options: Callable[[argparse.ArgumentParser], None] | None = None


def parse(study: Study, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a study's command."""
    parser = argparse.ArgumentParser(prog=f"python -m cusprun.benchmarks.peers.{study.name}", description=study.about)
    add = parser.add_argument
    add("--scenario", nargs="+", help=f"only these: {' '.join(scene.name for scene in study.scenes)}")
    add("--ratio", nargs="+", type=float, help="only these shares of all parameters removed")
    add("--method", nargs="+", help="only these methods")
    add("--only", nargs="+", metavar="GLOB", help="only cells whose name matches, such as '*/0.25/*'")
    add("--list", action="store_true", help="print the cells' names and leave")
    add("--model", default=DEFAULT_MODEL, help="the dense model")
    add("--corpus", type=Path, help="your own text as the only scenario")
    add("--tokens", type=int, default=TOKENS, help="calibration tokens")
    add("--window", type=int, default=WINDOW, help="tokens of a calibration window")
    add("--eval-tokens", type=int, default=EVAL_TOKENS, help="tokens of each held-out text")
    add("--questions", type=int, default=study.questions, help="most multiple-choice questions")
    add("--flag", nargs="+", default=[], metavar="NAME=VALUE", help="further flags of prune for every cell")
    add("--threads", type=int)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--work", type=Path, help="folder of results and models; default: in the cache")
    add("--out", type=Path, help="results without suffix; default docs/results/<study>")
    if study.options is not None:
        study.options(parser)
    return parser.parse_args(arguments)


def run_study(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 where every cell asked for has its result, 1 where some have not, 2 for bad options."""
    options = parse(study, arguments)
    try:
        return _run(study, options)
    except (InvalidRequest, Failed) as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with the next cell")
        return 130


def _run(study: Study, options: argparse.Namespace) -> int:
    scenes = [own_scene(options.corpus)] if options.corpus else list(study.scenes)
    cells = study.cells(scenes, options.tokens)
    if options.scenario:
        find_scenes(options.scenario, scenes)
    wanted = [cell.name for cell in cells if chosen(cell, options)]
    if options.list:
        print("\n".join(wanted))
        return 0
    if not wanted:
        raise InvalidRequest(f"no cell of the study is that; --list shows all {len(cells)}")
    setup = Setup(
        options.model, options.work or cache_folder() / "studies", options.tokens, options.window,
        options.eval_tokens, options.questions, _flags(options.flag), options.threads, options.device,
    )  # fmt: skip
    out = options.out or Path("docs/results") / study.name
    grid = Grid(setup, cells, scenes, (study.name, study.also) if study.also else None, out.parent)
    telling = Telling(study, options, wanted)
    before = own_records(out.with_name(out.name + ".json"), telling.settings())

    def show(more: tuple[dict[str, Any], list[str]] = ({}, [])) -> None:
        found = {cell.name: grid.result(cell) for cell in cells}
        rows = [as_row(cell, result) for cell in cells if (result := found[cell.name]) is not None]
        missing = {name: grid.failures.get(name, "") for name, result in found.items() if result is None}
        figures, lines = more
        unknown = grid.of_unknown_vocabulary()
        if waiting := [record for name, record in before if name in unknown]:
            figures = {**figures, "waiting": waiting}
        write_pages(out, telling, rows, missing, dense_figures(grid, scenes), figures, lines)

    grid.run(wanted, show)
    show(study.more(grid, options) if study.more else ({}, []))
    say(f"written: {out}.md .csv .json .png")
    return 1 if grid.failures else 0


def own_records(path: Path, settings: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Cells of a study's JSON with these settings by name, with those that wait for another's tokens."""
    whole = read_study(path)
    if whole.get("settings") != settings:
        return []
    by_key = {record["key"]: record for record in [*whole.get("cells", ()), *whole.get("waiting", ())]}
    return [(record.get("name", record["cell"]), record) for record in by_key.values()]


def chosen(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether the filters let the cell pass; one that lacks a filtered label does."""
    for name in FILTERS:
        wanted = getattr(options, name)
        value = cell.scene.name if name == "scenario" else cell.labels.get(name)
        if wanted and value is not None and value not in wanted:
            return False
    return not options.only or any(fnmatchcase(cell.name, glob) for glob in options.only)


def dense_figures(grid: Grid, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Bits per byte of the dense model by scene and text, for scenes whose texts were written."""
    from cusprun.corpora.selection import read_texts

    found = {}
    for scene in scenes:
        path = grid.texts_path(scene)
        if path.is_file():
            found[scene.name] = grid.gauge.dense_texts(read_texts(path)[0])
    return found


def _flags(values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for name, equals, value in pairs:
        if not name or not equals or not value:
            raise InvalidRequest(f"--flag {name}: write NAME=VALUE, such as align=64")
    return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class Telling:
    """What the pages say of how the figures came about."""

    study: Study
    options: argparse.Namespace
    wanted: Sequence[str]
    module: str = field(init=False, default="cusprun.benchmarks.peers")

    def command(self) -> str:
        """The command that gives the whole study with these settings: without filters and folders."""
        words = [f"python -m {self.module}.{self.study.name}"]
        given: Mapping[str, tuple[Any, Any]] = {
            "model": (Path(self.options.model).name, DEFAULT_MODEL),
            "corpus": (self.options.corpus and self.options.corpus.name, None),
            "tokens": (self.options.tokens, TOKENS),
            "window": (self.options.window, WINDOW),
            "eval-tokens": (self.options.eval_tokens, EVAL_TOKENS),
            "questions": (self.options.questions, self.study.questions),
            "flag": (" ".join(self.options.flag), ""),
            "device": (self.options.device, "cpu"),
        }
        words += [f"--{name} {value}" for name, (value, default) in given.items() if value != default]
        return " ".join(words)

    def settings(self) -> dict[str, Any]:
        names = ("tokens", "window", "eval_tokens", "questions", "device")
        found = {name: getattr(self.options, name) for name in names}
        found["model"] = Path(self.options.model).name
        if self.options.corpus:
            found["corpus_sha256"] = sha256_file(self.options.corpus)
        return found


def main_of(study: Study) -> None:
    """The study's module as a program; ended by a signal it ends its child too."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run_study(study))


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
