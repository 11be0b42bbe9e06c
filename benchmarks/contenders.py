"""What an expert is compared with: its own artifacts, the dense model it came from in every type, smaller models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun import onnx_types
from cusprun.benchmarks.frontier import Candidate, compare
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.catalog import make_scenario
from cusprun.corpora.document import Scenario
from cusprun.corpora.own import parse_dimension, parse_own_text, read_own
from cusprun.corpora.selection import Selection, read_texts
from cusprun.dense import Dense, find_dense
from cusprun.errors import InvalidRequest
from cusprun.exporters.dense_artifacts import DenseArtifacts
from cusprun.formats import Rounding, format_of
from cusprun.preflight import model_name
from cusprun.quants import TYPES
from cusprun.recipe import Recipe, read_recipe
from cusprun.runtimes import is_onnx, no_artifact

REFERENCE = "q8_0"  # of the dense model: what all are held against


@dataclass(frozen=True)
class Expert:
    """The folder of a build."""

    folder: Path
    card: dict[str, Any]

    @classmethod
    def at(cls, folder: Path) -> Expert:
        """Raises InvalidRequest where the folder is none."""
        try:
            card = json.loads((folder / "expert.json").read_text(encoding="utf-8"))
            if not (card["name"] and card["base"]["id"] and isinstance(card["artifacts"], list)):
                raise ValueError("it names no model")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"{folder} is no expert that a build left: {error}") from error
        return cls(folder, card)

    @property
    def recipe(self) -> Recipe:
        return read_recipe(self.folder / "recipe.yaml")

    def candidates(self) -> list[Candidate]:
        """Its artifacts. Raises InvalidRequest where one is not there."""
        found = []
        for entry in self.card["artifacts"]:
            path = self.folder / str(entry["path"])
            if not path.resolve().is_relative_to(self.folder.resolve()) or not path.exists():
                raise InvalidRequest(f"{self.folder}/expert.json names {entry['path']}, which is not there")
            found.append(Candidate(expert_name(self.card["name"], entry["quant"]), path, "expert"))
        if not found:
            raise InvalidRequest(f"{self.folder} holds no artifact: build it without stopping at the model folder")
        return found

    def texts(self) -> dict[str, list[str]]:
        """Its held-out texts. Raises InvalidRequest where they are not there any more."""
        path = self.folder / ".stages" / "texts.jsonl"
        if not path.is_file():
            raise InvalidRequest(f"{self.folder} has no held-out text any more ({path}): name a text with --text FILE")
        return read_texts(path)[0]


def find_candidates(paths: Sequence[Path]) -> tuple[list[Candidate], list[Expert]]:
    """Artifacts to compare of paths to experts, .gguf files, ONNX folders and model folders; and the experts.

    Raises one InvalidRequest with every path that is none.
    """
    found: list[Candidate] = []
    experts: list[Expert] = []
    problems = []
    for path in paths:
        try:
            if path.is_dir() and (path / "expert.json").is_file():
                experts.append(Expert.at(path))
                found += experts[-1].candidates()
            elif (path.is_file() and path.suffix == ".gguf") or is_onnx(path) or (path / "config.json").is_file():
                found.append(Candidate(path.stem if path.is_file() else path.resolve().name, path, "given"))
            else:
                raise no_artifact(path)
        except InvalidRequest as error:
            problems.append(str(error))
    if problems:
        raise InvalidRequest.together(problems)
    return found, experts


def compare_artifacts(
    paths: Sequence[Path],
    *,
    quants: Sequence[str] = (),
    dense: str | None = None,
    smaller: Sequence[str] = (),
    text: Path | None = None,
    eval_tokens: int = 6144,
    repetitions: int | None = 5,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """:func:`cusprun.benchmarks.frontier.compare` of what lies at ``paths`` and of dense models.

    ``quants`` are the types, joined by commas or "all" (of the formats of what lies there), that ``dense`` (by itself
    the model that the first expert came from) and the ``smaller`` models are taken in. Raises InvalidRequest where
    something makes no sense, all at once.
    """
    candidates, experts = find_candidates(paths)
    expert = experts[0] if experts else None
    formats = {"onnx" if is_onnx(one.path) else "gguf" for one in candidates}  # a model folder weighs against files too
    types = _types(quants, expert.recipe.rounding if expert is not None else "nearest", formats)
    problems = []
    if text is None and expert is None:
        problems.append("no expert is among them, whose held-out text could be taken: name a text with --text FILE")
    if (dense or smaller) and not types:
        problems.append("--dense and --smaller say whose types: name them with --quant, such as --quant q8_0,q4_0")
    if types and dense is None and expert is None:
        problems.append("no expert is among them, so the dense model is unknown: name it with --dense")
    if problems:
        raise InvalidRequest.together(problems)
    texts = own_text(text) if text is not None else expert.texts() if expert is not None else {}
    with ExitStack() as opened:
        models: list[tuple[str, str | None]] = [(model, None) for model in smaller]
        if dense is not None:
            models.insert(0, (dense, None))
        elif expert is not None:
            models.insert(0, (expert.recipe.model, expert.recipe.revision))
        made = [opened.enter_context(dense_artifacts(*model, expert)) for model in models]
        reference = made[0].artifact(REFERENCE) if made else candidates[0].path
        for one in made if types else ():
            candidates += dense_candidates(one, types)
        return compare(
            candidates, texts, reference=reference, max_tokens=eval_tokens, repetitions=repetitions, threads=threads,
            device=device,
        )  # fmt: skip


def every(rounding: Rounding, formats: Collection[str] = ("gguf",)) -> tuple[str, ...]:
    """Every type of these formats that rounds, largest first, without what needs an importance matrix where none is
    taken.
    """
    kinds = [kind for kind, one in TYPES.items() if not one.plain] if "gguf" in formats else []
    found = [kind for kind in kinds if rounding != "nearest" or not TYPES[kind].needs_imatrix]
    if "onnx" in formats:
        found += [kind for kind, one in onnx_types.TYPES.items() if one.bits < 16]
    return tuple(found)


def _types(quants: Sequence[str], rounding: Rounding, formats: Collection[str]) -> list[str]:
    """Types joined by commas come apart, ``all`` is every one of the formats.

    Raises InvalidRequest for what is no type, or cannot be written with this rounding.
    """
    named = [part for value in quants for part in value.split(",") if part]
    rounded = every(rounding, formats)
    types = list(dict.fromkeys(kind for name in named for kind in (rounded if name == "all" else (name,))))
    for kind in types:
        if format_of(kind) == "gguf" and rounding == "nearest" and TYPES[kind].needs_imatrix:
            raise InvalidRequest(
                f"--quant {kind} needs an importance matrix, which is taken of an expert's calibration text: compare "
                "with an expert that was not built with --rounding nearest, or name another type"
            )
    return types


@contextmanager
def dense_artifacts(model: str, revision: str | None, expert: Expert | None) -> Iterator[DenseArtifacts]:
    """The dense model in any type, written as the expert's recipe has it, rounded on the expert's calibration text.

    Without an expert there is no text: all is rounded to the nearest.
    """
    dense = find_dense(model, revision)
    with tempfile.TemporaryDirectory(prefix="cusprun-compare-") as aside:
        if expert is None:
            yield DenseArtifacts(dense, Path(aside) / "none", Path(aside), wish="nearest")
            return
        yield DenseArtifacts.of(expert.recipe, dense, calibration_windows(expert, dense), Path(aside))


def calibration_windows(expert: Expert, dense: Dense) -> Path:
    """The expert's calibration text in the tokens of ``dense``, which may be another model than its own."""
    own = expert.folder / ".stages" / "windows.safetensors"
    if own.is_file() and expert.card["base"]["sha256"] == dense.sha256:
        return own
    recipe = expert.recipe
    scenario = make_scenario(recipe.lang, recipe.domain, recipe.task)
    files = tuple(map(parse_own_text, recipe.corpus))
    selection = Selection.of(recipe, scenario, files, dict(map(parse_dimension, recipe.dim)))
    folder = cache_folder() / "frontier" / f"{selection.key()[:16]}-{dense.key[:16]}"
    windows, texts = folder / "windows.safetensors", folder / "texts.jsonl"
    if not texts.is_file():  # it is written last
        selection.write(load_tokenizer(dense.folder), windows, texts)
    return windows


def own_text(path: Path) -> dict[str, list[str]]:
    """A text file of the user's, by its name. Raises InvalidRequest where it cannot be read."""
    return {path.stem: [document.text for document in read_own(path, "text", Scenario())]}


def dense_candidates(artifacts: DenseArtifacts, quants: Sequence[str]) -> list[Candidate]:
    """The dense model in these types."""
    return [Candidate(dense_name(artifacts.dense, quant), artifacts.artifact(quant), "dense") for quant in quants]


def expert_name(name: str, quant: str) -> str:
    """What an expert's artifact is called beside others."""
    return f"{name} {quant}"


def dense_name(dense: Dense, quant: str) -> str:
    """What the dense model in a type is called there."""
    return f"{model_name(dense.id)} {quant}"
