"""A grid of cells, each one pruned model: `cusprun-edge prune` with the cell's flags, then what is left is measured.

Cells that calibrate on the same scene share one output folder, so that text, statistics, prices and measured losses
are shared by their content hashes. A cell's result is a file named after the hash of all that it depends on: flags,
texts, dense model, versions of the stages. A cell that has its file is not run again, whichever study asks for it; nor
is one whose hash stands in the JSON of a study beside this one's results, which another machine may have written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.held_out import Gauge
from cusprun.benchmarks.peers.scenes import Scene, made_path, selection_key, write_made
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.own import parse_own_text
from cusprun.corpora.selection import read_aside, read_texts
from cusprun.dense import Dense, find_dense
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import sha256_file, sha256_tree, write_json
from cusprun.progress import say
from cusprun.recipe import BUDGET, make_recipe
from cusprun.stages import VERSIONS

PAGE_FIELDS = {"name", "scenario", "labels"}  # that a study's JSON adds to a result
CONTEXT = 512  # tokens of an evaluation window, as llama-perplexity has them
REFIT_ALONE = {"sensitivity", "spend", "refit"}  # stages whose change leaves the other methods' results as they are
WHOLE = 2  # the version of the vocabulary's prices that stands in the keys of cells which keep it whole
SAME_ORDER = {3: 2}  # versions of the vocabulary's prices whose tokens go in the order of an older one
AFTER_PRUNE = {
    "model",
    "revision",
    "device",
    "rounding",
    "tensor_type",
    "measure",
    "against_quantization",
    "eval_tokens",
    "questions",
    "repetitions",
    "threads",
    "name",
    "out",
}  # fields of the recipe that leave the pruned model as it is, or that the key holds otherwise
# Stages that come after the prune.
LATER = {"imatrix", "gptq", "gguf", "onnx", "quality", "questions", "samples", "speed", "frontier"}
STAGE_LINE = re.compile(r"^([a-z0-9._]+): (?:done before, kept|[0-9.]+ s)$")

# More to measure of a cell's model: the gauge, the model folder, its calibration windows, the held-out texts.
Also = Callable[[Gauge, Path, Path, Mapping[str, list[str]]], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One pruned model of a study."""

    name: str  # unique in the study; --only matches it
    scene: Scene  # whose held-out texts it is measured on
    settings: Mapping[str, Any]  # flags of prune
    labels: Mapping[str, Any]  # what tells it from the others, by column of the table
    calibration: Scene | None = None  # where it is not the scene's own text
    vocab_of: str | None = None  # the cell whose number of tokens this one gets


@dataclass(frozen=True)
class Setup:
    """What holds for every cell."""

    model: str
    work: Path
    tokens: int
    window: int
    eval_tokens: int
    questions: int  # at most asked; 0 asks none
    flags: Mapping[str, Any] = field(default_factory=dict)  # further flags of prune
    threads: int | None = None
    device: str = "cpu"


class Refused(InvalidRequest):
    """The command line does not take a cell's flags."""


class Grid:
    """Runs cells and finds their results. ``scenes`` are all that a made text file may be written for; ``records`` is
    a folder of studies' JSON files, whose cells count as run.
    """

    def __init__(
        self,
        setup: Setup,
        cells: Sequence[Cell],
        scenes: Sequence[Scene],
        also: tuple[str, Also] | None = None,
        records: Path | None = None,
    ) -> None:
        self.setup, self.also = setup, also
        self.recorded: set[str] = set()  # names of cells
        for record in read_records(records) if records is not None else []:
            self.recorded.add(record["cell"])
            if not (path := self._path(record["key"])).is_file():
                write_json(path, record)
        self.cells = {cell.name: cell for cell in cells}
        if len(self.cells) < len(cells):
            raise ValueError("two cells of the study have one name")
        self.scenes = {scene.name: scene for scene in scenes}
        self.dense: Dense = find_dense(setup.model)
        self.gauge = Gauge(
            self.dense, setup.work / "dense",
            context=CONTEXT, eval_tokens=setup.eval_tokens, threads=setup.threads, device=setup.device,
        )  # fmt: skip
        self.failures: dict[str, str] = {}  # cells that did not come out in this run, with the reason

    # running ----------------------------------------------------------------------------------------------------------

    def run(self, names: Sequence[str], after_each: Callable[[], None]) -> None:
        """Runs the cells that have no result, those first that they take their vocabulary from."""
        wanted = self._with_sources(names)
        times: list[float] = []
        self._write_texts_of_records()
        for number, name in enumerate(wanted, 1):
            if self.result(self.cells[name]) is not None:
                say(f"cell {number}/{len(wanted)} {name}: done before, kept")
                continue
            start = time.monotonic()
            say(f"cell {number}/{len(wanted)} {name}")
            try:
                self.run_cell(self.cells[name])
            except (InvalidRequest, Failed) as error:  # the others may still be possible
                self.failures[name] = str(error)
                say(f"cell {name} did not come out: {error}")
                continue
            times.append(time.monotonic() - start)
            left = sum(self.result(self.cells[other]) is None for other in wanted[number:])
            say(f"cell {name}: {times[-1]:.0f} s; about {left * sum(times) / len(times) / 60:.0f} min for {left} more")
            after_each()

    def _write_texts_of_records(self) -> None:
        """The texts that the keys of recorded cells hang on; those of other cells are written when these are run."""
        for cell in self.cells.values():
            if cell.name not in self.recorded:
                continue
            try:
                self.write_texts(cell.scene)
                self._write_made(cell)
            except (InvalidRequest, Failed) as error:
                say(f"the record of {cell.name} cannot be used, its text is not to be had: {error}")

    def _with_sources(self, names: Sequence[str]) -> list[str]:
        found: dict[str, None] = {}
        for name in names:
            source = self.cells[name].vocab_of
            if source is not None:
                found.setdefault(source)
            found.setdefault(name)
        return list(found)

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Prunes, measures, writes the result. Raises Refused or Failed with what the command line said."""
        self._write_made(cell)
        texts_path = self.write_texts(cell.scene)
        key, flags = self.key(cell), self.flags(cell)
        if key is None or flags is None:
            raise Refused(f"its vocabulary is that of {cell.vocab_of}, which has no result")
        if (known := self.result(cell)) is not None:  # of another study, found now that the texts are there
            return known
        out = self.setup.work / "experts" / (cell.calibration or cell.scene).name
        expert, stages = self.prune(out, flags)
        texts, asked = read_texts(texts_path)
        vocabulary, model = expert["expert"]["vocabulary"], out / "model"
        windows = out / ".stages" / "windows.safetensors"
        whole = vocabulary == self.dense.anatomy.vocab_size
        record = json.loads((out / ".stages" / "text.json").read_text(encoding="utf-8"))["value"]["corpora"]
        result = {
            "key": key,
            "cell": cell.name,
            "flags": flags_as_words(flags, names_only=True),
            "expert": {name: expert["expert"][name] for name in ("parameters", "vocabulary")},
            "dense": {"parameters": self.dense.anatomy.parameters, "vocabulary": self.dense.anatomy.vocab_size},
            "removed_share": expert["method"]["removed_share"],
            "predicted": expert["method"].get("predicted_nats_per_token"),
            "seconds": round(sum(stages.values()), 2),
            "stages": stages,
            "calibration": [
                {name: row[name] for name in ("text", "entry", "documents", "tokens_of_text")}
                for row in record if row["side"] == "calibration"
            ],
            "texts": self.gauge.texts(model, vocabulary, texts),
            "aside": self._aside(model, windows) if whole else None,
            "questions": self.gauge.questions(model, asked, self.setup.questions),
            "environment": environment(),
            "device": self.setup.device,
        }  # fmt: skip
        if self.also is not None:
            result[self.also[0]] = self.also[1](self.gauge, model, windows, texts)
        write_json(self._path(key), result)
        return result

    def _aside(self, model: Path, windows: Path) -> dict[str, float] | None:
        """On the calibration-side text that is set aside, where there is any."""
        found = read_aside(windows)
        return self.gauge.windows(model, np.concatenate(list(found.values()))) if found else None

    def prune(self, out: Path, flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
        """`cusprun-edge prune` in a process of its own: its expert.json, and the seconds of the stages that it used,
        those of kept stages from when they ran.
        """
        if out.is_dir():  # of the cell before, whose stages stay
            for path in out.iterdir():
                if path.name != ".stages":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        words = [self.setup.model, "--out", str(out), "--json", *flags_as_words(flags)]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
            child = subprocess.Popen(
                [sys.executable, "-m", "cusprun.cli", "prune", *words], stdout=stdout, stderr=subprocess.PIPE, text=True
            )
            assert child.stderr is not None
            lines = []
            try:
                for line in child.stderr:
                    lines.append(line.rstrip("\n"))
                    say(f"    {lines[-1]}")
                code = child.wait()
            except BaseException:
                child.terminate()
                child.wait()
                raise
            stdout.seek(0)
            said = stdout.read()
        if code:
            message = "\n".join(lines).partition("cusprun-edge:")[2].strip() or "\n".join(lines[-3:])
            raise Refused(message) if code == 2 else Failed(message or f"prune ended with {code}")
        used = [found[1] for line in lines if (found := STAGE_LINE.match(line)) and found[1] in VERSIONS]
        return json.loads(said), {name: _seconds_of(out, name) for name in used}

    # results ----------------------------------------------------------------------------------------------------------

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell that was run before with the same flags and texts, else None."""
        key = self.key(cell)
        if key is None or not self._path(key).is_file():
            return None
        found: dict[str, Any] = json.loads(self._path(key).read_text(encoding="utf-8"))
        return found

    def of_unknown_vocabulary(self) -> set[str]:
        """Names of cells whose number of tokens is that of a cell without a result."""
        return {cell.name for cell in self.cells.values() if cell.vocab_of is not None and self.flags(cell) is None}

    def _path(self, key: str) -> Path:
        return self.setup.work / "cells" / f"{key[:32]}.json"

    def key(self, cell: Cell) -> str | None:
        """Hash over all that the result depends on; None where a text or another cell's result is still missing."""
        texts, made, flags = self.texts_path(cell.scene), self._made(cell), self.flags(cell)
        if flags is None or not texts.is_file() or (made is not None and not made.is_file()):
            return None
        recipe = make_recipe(flags)  # a flag that is left out is the same as its default
        own = [[_sha256(text.path), text.weight] for text in map(parse_own_text, recipe.corpus)]
        contents = {**recipe.model_dump(mode="json", exclude=AFTER_PRUNE), "corpus": own, "combine": recipe.combined}
        for name in (
            *BUDGET,
            "device_profile",
            "recover_steps",
        ):  # where they are not given the key is that of before there were such
            if contents[name] is None:
                del contents[name]
        contents["widths"] = recipe.cuts_by if recipe.method == "refit" else None
        if recipe.method != "refit":  # the form decides nothing there: the key of when this was the default
            contents["form"] = "sequential"
        if recipe.recover is None:  # nor its rate without recovery
            contents["recover_rate"] = 1e-4
        apart = LATER if recipe.method == "refit" else LATER | REFIT_ALONE
        versions = {stage: number for stage, number in VERSIONS.items() if stage not in apart}
        if recipe.vocab == "keep":
            versions["prices"] = WHOLE
        elif recipe.vocab != "auto":  # how many tokens go is given
            versions["prices"] = SAME_ORDER.get(versions["prices"], versions["prices"])
        measured = [CONTEXT, self.setup.eval_tokens, self.setup.questions, self.also and self.also[0]]
        selection = selection_key(cell.scene, self.setup.window)
        values = [self.dense.key, contents, selection, _sha256(texts), measured, versions]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def flags(self, cell: Cell) -> dict[str, Any] | None:
        """The flags of prune; None where they hang on a cell that has no result."""
        scene = cell.calibration or cell.scene
        flags = {
            "tokens": self.setup.tokens, "window": self.setup.window,
            **scene.flags(), **self.setup.flags, **cell.settings,
        }  # fmt: skip
        if (made := self._made(cell)) is not None:
            flags["corpus"] = (*flags.get("corpus", ()), str(made))
        if self.setup.device != "cpu":
            flags["device"] = self.setup.device
        if cell.vocab_of is not None:
            source = self.result(self.cells[cell.vocab_of])
            if source is None:
                return None
            flags["vocab"] = str(source["expert"]["vocabulary"])
        return flags

    def _made(self, cell: Cell) -> Path | None:
        scene = cell.calibration or cell.scene
        if scene.made is None or scene.of is None:
            return None
        return made_path(scene.made, self.scenes[scene.of], self.setup.work / "texts", self.setup.window)

    def _write_made(self, cell: Cell) -> None:
        """The text file made for the cell's calibration, where it has one and that is not written yet."""
        made, calibration = self._made(cell), cell.calibration or cell.scene
        if made is not None and not made.is_file():
            write_made(str(calibration.made), self.scenes[str(calibration.of)], made)

    # held-out texts ---------------------------------------------------------------------------------------------------

    def texts_path(self, scene: Scene) -> Path:
        """Where the held-out texts of a scene lie; the name changes with what decides them."""
        key = hashlib.sha256(f"{selection_key(scene, self.setup.window)}{self.dense.key}".encode()).hexdigest()
        return self.setup.work / "texts" / f"held-out-{scene.name}-{key[:12]}.jsonl"

    def write_texts(self, scene: Scene) -> Path:
        """The held-out texts of a scene, written where they are not yet."""
        path = self.texts_path(scene)
        if not path.is_file():
            say(f"held-out texts of {scene.name}")
            with tempfile.TemporaryDirectory(prefix="cusprun-study-") as scratch:
                windows = Path(scratch) / "windows.safetensors"
                scene.selection(self.setup.window).write(load_tokenizer(self.dense.folder), windows, path)
        return path


def read_study(path: Path) -> dict[str, Any]:
    """A study's JSON; empty where the file is none."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return whole if isinstance(whole, dict) else {}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Results of cells from every JSON file of a study in the folder; other files hold none."""
    found: dict[str, dict[str, Any]] = {}  # by key: two studies may hold one
    for path in sorted(folder.glob("*.json")):
        whole = read_study(path)
        lists = [whole.get(name) for name in ("cells", "waiting")]
        for record in chain.from_iterable(each for each in lists if isinstance(each, list)):
            if isinstance(record, dict) and {"key", "cell", "texts", "expert"} <= record.keys():
                found[record["key"]] = {name: value for name, value in record.items() if name not in PAGE_FIELDS}
    return list(found.values())


def flags_as_words(flags: Mapping[str, Any], names_only: bool = False) -> list[str]:
    """The command line's words; with ``names_only`` files go by their name."""
    words: list[str] = []
    for name, value in flags.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            shown = Path(str(each)).name if names_only and name == "corpus" else str(each)
            words += [f"--{name.replace('_', '-')}", shown]
    return words


def _seconds_of(out: Path, stage: str) -> float:
    found: float = json.loads((out / ".stages" / f"{stage}.json").read_text(encoding="utf-8"))["seconds"]
    return found


@cache  # a study's texts stay as they are while it runs
def _sha256(path: Path) -> str:
    return sha256_tree(path) if path.is_dir() else sha256_file(path)
