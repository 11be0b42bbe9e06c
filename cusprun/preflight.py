"""Everything that can be known before the first expensive step: what will be done, what it needs, what is missing.

All problems are reported together; nothing is written.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from cusprun.allocation import default_align, largest_ratio
from cusprun.anatomy import Anatomy
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.catalog import Entry, Source, check_scenario, find_entries, make_scenario
from cusprun.corpora.document import Document, OwnText, Scenario
from cusprun.corpora.listing import download_bytes, unreachable
from cusprun.corpora.own import parse_dimension, parse_own_text, read_own
from cusprun.corpora.packing import FEWEST
from cusprun.corpora.sampling import all_entries, calibration_entries, general_entries
from cusprun.corpora.sources import is_cached
from cusprun.dense import Sizes, check_folder, local_path, read_sizes
from cusprun.errors import Failed, InvalidRequest, MissingPackage
from cusprun.formats import format_of, rounding_of
from cusprun.layouts import Limits, limits_of
from cusprun.needs import minutes, needs
from cusprun.recipe import WHOLE_MODEL, Recipe, read_recipe

CUT_AGAIN = ("refit", "shortgpt")  # methods for experts that have lost attention in some layer
# Fields of a recipe that say where the expert lies and how it is measured: what it is hangs on the others.
MEASURING = {"out", "measure", "against_quantization", "eval_tokens", "repetitions", "threads"}


@dataclass(frozen=True)
class Prepared:
    """A recipe whose preconditions hold."""

    recipe: Recipe
    scenario: Scenario
    own: tuple[OwnText, ...]
    dims: dict[str, Path]
    out: Path
    name: str
    sizes: Sizes
    limits: Limits
    download_bytes: int
    disk_bytes: int
    memory_bytes: int
    artifacts: bool  # whether files for runtimes come after the model folder

    def describe(self) -> str:
        """The plan in a few lines: model, scenario, text, tokens, disk, memory, rough time."""
        recipe, sizes = self.recipe, self.sizes
        cut = f"ε {recipe.epsilon:g}" if recipe.epsilon is not None else recipe.budget.words()
        if recipe.removed_share is not None:
            cut = f"{recipe.removed_share:.0%} of all parameters"
        dimensions = [*(self.scenario.given() or ["general"]), *self.dims]
        general = (
            recipe.general if self.scenario.given().get("domain") != "general" and dimensions != ["general"] else 0
        )
        low, high = minutes(recipe, sizes, self.artifacts)
        method = [recipe.method, recipe.combined, cut, f"{self.limits.layout} layout"]
        if recipe.method == "refit":
            method[1:2] = [recipe.combined, recipe.form, f"widths {recipe.cuts_by}"]
        method.append(f"vocabulary {recipe.vocab}")
        lines = [
            f"model     {recipe.model} ({sizes.parameters / 1e6:.1f} M parameters)",
            f"scenario  {self.scenario}" + "".join(f" + {text.path.name}" for text in self.own),
            f"text      {recipe.tokens:,} calibration tokens in windows of {recipe.window}: {', '.join(dimensions)}"
            + (f", {general:.0%} general" if general else "")
            + f"; to fetch: {self.download_bytes / 2**20:.0f} MiB",
            f"method    {', '.join(method)}" + (f", then {recipe.recover}" if recipe.recover else ""),
            *([f"layout    {self.limits.note}"] if self.limits.note else []),
            f"output    {self.out}: model/"
            + (f", {_formats(recipe)}" if self.artifacts else "")
            + (", report/" if self.artifacts and recipe.measure else ""),
            f"needs     {_size(self.disk_bytes)} disk, {_size(self.memory_bytes)} memory, "
            f"roughly {low:.0f} to {high:.0f} minutes without downloads",
        ]
        return "\n".join(lines)


def prepare(recipe: Recipe, *, artifacts: bool = True) -> Prepared:
    """Checks everything that needs no work; ``artifacts`` says whether files for runtimes are to be written.

    Raises one error with every problem found: Failed where trying again may help (the hub did not answer, a file is
    damaged) and nothing else is wrong, else InvalidRequest.
    """
    problems = _Problems()
    problems.add(*_missing_packages(recipe))
    if artifacts and recipe.method == "slicegpt":
        problems.add("--method slicegpt: no runtime holds its shortcut matrices; cusprun-edge prune writes the model")
    if recipe.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            problems.add("--device cuda: torch finds no CUDA device here; write --device cpu")
    scenario = make_scenario(recipe.lang, recipe.domain, recipe.task)
    own = tuple(text for value in recipe.corpus if (text := problems.attempt(partial(parse_own_text, value))))
    pairs = [pair for value in recipe.dim if (pair := problems.attempt(partial(parse_dimension, value)))]
    problems.add(*_given_twice("--corpus was given two files named {}; rename one", [text.path.name for text in own]))
    problems.add(*_given_twice("--dim {} was given twice; choose another name", [name for name, _ in pairs]))
    dims = dict(pairs)
    known = [*(scenario.given() or ["general"]), *dims]
    problems.add(
        *(f"--weight {name}: no such dimension; dimensions here: {', '.join(known)}"
          for name in recipe.weights if name not in known)
    )  # fmt: skip
    problems.attempt(partial(find_entries, recipe.include))
    problems.attempt(lambda: check_scenario(scenario, own=bool(recipe.corpus), named=recipe.include))
    entries = all_entries(scenario, recipe.include)
    if recipe.general and scenario.given() and scenario.domain != "general":
        entries += tuple(entry for entry in general_entries(scenario, recipe.include) if entry not in entries)
    problems.add(*_unfetchable(entries))
    _check_texts(recipe, scenario, own, dims, problems)
    download = download_bytes(entries)
    sizes: Sizes | None = problems.attempt(lambda: read_sizes(recipe.model, recipe.revision))
    name = recipe.name or f"{model_name(recipe.model)}-{scenario}".replace(" ", "-")
    out = (recipe.out or Path("experts") / name).expanduser()
    problems.add(*check_out(out, recipe))
    disk = memory = 0
    limits: Limits | None = None
    if sizes is not None:
        limits = problems.attempt(partial(limits_of, recipe, sizes.anatomy, export=artifacts))
        _check_model(recipe, sizes, limits, problems)
        disk, memory = needs(recipe, sizes, artifacts)
        problems.add(*_too_little(out, sizes, disk, memory, download))
    if problems.found or sizes is None or limits is None:
        raise problems.together()
    return Prepared(recipe, scenario, own, dims, out, name, sizes, limits, download, disk, memory, artifacts)


class _Problems:
    """What was found wrong so far."""

    def __init__(self) -> None:
        self.found: list[InvalidRequest | Failed] = []

    def add(self, *lines: str) -> None:
        self.found.extend(map(InvalidRequest, lines))

    def attempt(self, check: Callable[[], Any], otherwise: Any = None) -> Any:
        """What ``check`` returns; ``otherwise`` where it raises, and the problem is kept."""
        try:
            return check()
        except (InvalidRequest, Failed) as error:
            self.found.append(error)
            return otherwise

    def together(self) -> InvalidRequest | Failed:
        error = InvalidRequest.together(map(str, self.found))
        return Failed(str(error)) if all(isinstance(problem, Failed) for problem in self.found) else error


def model_name(model: str) -> str:
    """The last part of a path or hub id, in lower case."""
    last = model.rstrip("/").split("/")[-1]
    if last in ("", ".", ".."):
        last = Path(model).resolve().name
    return last.removesuffix(".gguf").lower()


def _formats(recipe: Recipe) -> str:
    """The folders that artifacts go into, each with its types, and how those are rounded that have a choice."""
    told = {quant: rounding_of(quant, recipe.rounding, zero_points=recipe.zero_points) for quant in recipe.quant}
    types = {quant: quant if how == "nearest" else f"{quant} ({how})" for quant, how in told.items()}
    folders = dict.fromkeys(map(format_of, recipe.quant))
    which = " or ".join if recipe.budget else ", ".join
    return which(
        f"{name}/ in {which(text for quant, text in types.items() if format_of(quant) == name)}" for name in folders
    )


def _missing_packages(recipe: Recipe) -> list[str]:
    packages = {"torch": "torch", "transformers": "transformers", "llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    packages |= {"datasketch": "datasketch", "onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime": "onnxruntime"}
    if recipe.recover and find_spec("peft") is None:
        return [f"--recover {recipe.recover} needs the package peft: pip install 'cusprun[recover]'"]
    return [
        f"the package {published} is missing: pip install cusprun brings it"
        for module, published in packages.items()
        if find_spec(module) is None
    ]


def _given_twice(message: str, names: Sequence[str]) -> list[str]:
    return [message.format(name) for name, count in Counter(names).items() if count > 1]


def _unfetchable(entries: Sequence[Entry]) -> list[str]:
    """Clients and packages that fetching these entries needs and that are not here."""
    lines = [
        f"{line}; install it, or bring your own text with --corpus FILE (and --general 0 for no other)"
        for line in unreachable(entries)
    ]
    packages = [(entry.name, entry.source) for entry in entries if isinstance(entry.source, Source)]
    wheels = [name for name, source in packages if source.kind == "pypi" and not is_cached(source)]
    if wheels and find_spec("pip") is None:
        lines.append(f"there is no pip here, and {', '.join(wheels)} is fetched with it: python -m ensurepip")
    sets = [entry.name for entry in entries if not isinstance(entry.source, Source)]
    if sets and find_spec("datasets") is None:
        lines.append(str(MissingPackage("datasets", "eval", ", ".join(sets))))
    return lines


def _check_texts(
    recipe: Recipe, scenario: Scenario, own: Sequence[OwnText], dims: dict[str, Path], problems: _Problems
) -> None:
    """Reads the user's files; finds those that cannot serve, and a budget too small for the dimensions."""
    count = max(1, len(scenario.given())) + len(recipe.dim)
    least = count * FEWEST * recipe.window
    if recipe.tokens < least:
        problems.add(
            f"--tokens {recipe.tokens}: {count} dimensions share them and each needs {FEWEST} windows of "
            f"{recipe.window}; write --tokens {least} or more, or a smaller --window"
        )
    mine = [problems.attempt(partial(read_own, text.path, text.path.name, scenario)) for text in own]
    if mine and None not in mine and not calibration_entries(scenario, recipe.include):
        names = " --corpus ".join(str(text.path) for text in own)
        problems.add(*_too_short(f"--corpus {names}", [text for texts in mine for text in texts], recipe.window))
    for name, path in dims.items():
        documents = problems.attempt(partial(read_own, path, path.name, scenario))
        if documents is not None:
            problems.add(*_too_short(f"--dim {name}={path}", documents, recipe.window))


def _too_short(what: str, documents: Sequence[Document], window: int) -> list[str]:
    """Text that cannot fill the fewest windows whatever the tokenizer: a token is a byte at least.

    What a chat template adds is unknown here, so turns are let pass.
    """
    size = sum(len(document.text.encode("utf-8", "surrogatepass")) + 3 for document in documents)
    if any(document.turns for document in documents) or size >= FEWEST * window:
        return []
    return [f"{what} holds {size} bytes, too little for {FEWEST} windows of {window} tokens: give more text"]


def _check_model(recipe: Recipe, sizes: Sizes, limits: Limits | None, problems: _Problems) -> None:
    """Finds a tokenizer, a context or a size of the model that does not suit the recipe."""
    path = local_path(recipe.model)
    if path is not None and path.is_dir():
        problems.attempt(partial(check_folder, path, sizes.anatomy))
    if sizes.context is not None and recipe.window > sizes.context:
        problems.add(f"--window {recipe.window} is longer than the model's context: write {sizes.context} or less")
    bare = [index for index, layer in enumerate(sizes.anatomy.layers) if not layer.kv_heads]
    if bare and (recipe.method not in CUT_AGAIN or recipe.cuts_by != "measured"):
        problems.add(
            f"layer {bare[0]} of this model has no attention any more, which --method {recipe.method}, widths "
            f"{recipe.cuts_by}, cannot score: cut it again by --method refit, widths measured"
        )
        return
    if recipe.vocab.isdigit() and int(recipe.vocab) > sizes.anatomy.vocab_size:
        problems.add(f"--vocab {recipe.vocab}: the model has {sizes.anatomy.vocab_size} tokens; write fewer")
    if recipe.removed_share is not None:
        drops = limits is not None and limits.layers_go and limits.layout == "per-layer"
        problems.attempt(partial(check_ratio, recipe, recipe.removed_share, sizes.anatomy, drops))


def _too_little(out: Path, sizes: Sizes, disk: int, memory: int, download: int) -> list[str]:
    """Memory, and disk in the output folder and in the cache, that is not there."""
    lines = []
    free = psutil.virtual_memory().available
    if memory > free:
        lines.append(
            f"the build needs about {_size(memory)} of memory and {_size(free)} are free: "
            "close other programs, lower --tokens or take a smaller model"
        )
    place = _existing_parent(out)
    usage = shutil.disk_usage(place)
    if usage.total and usage.free < disk:  # total 0: no file system that holds files, and check_out says so
        lines.append(
            f"--out {out}: the build needs about {_size(disk)} of disk and {_size(usage.free)} are free there; "
            "choose another folder or make room"
        )
    free = shutil.disk_usage(_existing_parent(cache_folder())).free
    wanted = download * 3 + (sizes.parameters * 4 if sizes.convert else 0)
    if free < wanted:
        lines.append(
            f"the cache {cache_folder()} needs about {_size(wanted)} and {_size(free)} are free there: "
            "set CUSPRUN_CACHE to a folder with more room"
        )
    return lines


def check_ratio(recipe: Recipe, share: float, anatomy: Anatomy, layers_go: bool = True) -> None:
    """Raises InvalidRequest where the model cannot lose that share of its parameters.

    ``layers_go`` says whether measured widths may take whole layers.
    """
    align = recipe.align or default_align(anatomy, recipe.quant)
    drops_layers = recipe.method in WHOLE_MODEL or (
        recipe.method == "refit" and recipe.cuts_by == "measured" and layers_go
    )
    if drops_layers:
        anatomy_left = anatomy.with_layers([anatomy.layers[0], *[None] * (len(anatomy.layers) - 1)])
        largest = 1 - anatomy_left.parameters / anatomy.parameters * (1 - largest_ratio(anatomy_left, align))
    else:
        largest = largest_ratio(anatomy, align)
    if share > largest:
        raise InvalidRequest(
            f"--ratio {share:g}: embeddings and the smallest widths leave {largest:.2f} of this model to remove; "
            f"write a ratio below {largest:.2f}"
        )


def check_out(out: Path, recipe: Recipe) -> list[str]:
    """Why ``out`` cannot take this build: it holds something else, or it cannot be written."""
    if out.exists() and not out.is_dir():
        return [f"--out {out} is a file; name a folder"]
    saved = out / "recipe.yaml"
    if saved.is_file():
        begun = any(path.name not in (".stages", "recipe.yaml") for path in out.iterdir())
        if begun and not _gives_the_same(saved, recipe):
            return [f"--out {out} holds an expert of another recipe (see {saved}); choose another folder or remove it"]
    elif out.is_dir() and any(path.name != ".stages" for path in out.iterdir()):
        return [f"--out {out} holds something that is no expert; choose another folder"]
    place = _existing_parent(out)
    if not place.is_dir():
        return [f"--out {out}: {place} is a file; name another folder"]
    try:
        probe = place / f".cusprun-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return [f"--out {out}: {place} cannot be written: {error.strerror}; choose another folder"]
    return []


def _gives_the_same(saved: Path, recipe: Recipe) -> bool:
    """Whether a kept recipe differs from this one in nothing but how the expert is measured."""
    try:
        before = read_recipe(saved)
    except InvalidRequest:  # of another version, or spoilt
        return False
    return before.model_dump(exclude=MEASURING) == recipe.model_dump(exclude=MEASURING)


def _existing_parent(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
