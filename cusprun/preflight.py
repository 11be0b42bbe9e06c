"""Everything that can be known before the first expensive step: what will be done, what it needs, what is missing.

All problems are reported together; nothing is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from cusprun.anatomy import Anatomy
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.catalog import check_scenario, find_entries, make_scenario
from cusprun.corpora.document import OwnText, Scenario
from cusprun.corpora.listing import download_bytes
from cusprun.corpora.own import parse_dimension, parse_own_text, read_own
from cusprun.corpora.sampling import all_entries
from cusprun.dense import Sizes, read_sizes
from cusprun.errors import Failed, InvalidRequest
from cusprun.plan import default_align, largest_ratio
from cusprun.recipe import Recipe

BITS = {"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5, "q4_k_m": 5}  # a weight, block scales included
TOKENS_PER_GFLOP = 0.35  # share of a matrix product's speed that whole-model passes reach here


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
    download_bytes: int
    disk_bytes: int
    memory_bytes: int

    def describe(self) -> str:
        """The plan in a few lines: model, scenario, text, tokens, disk, memory, rough time."""
        recipe, sizes = self.recipe, self.sizes
        cut = (
            f"ε {recipe.epsilon:g}" if recipe.removed_share is None else f"{recipe.removed_share:.0%} of all parameters"
        )
        dimensions = [*self.scenario.given(), *self.dims] or ["general"]
        share = recipe.tokens // len(dimensions)
        low, high = self.minutes()
        lines = [
            f"model     {recipe.model} ({sizes.parameters / 1e6:.1f} M parameters)",
            f"scenario  {self.scenario}" + "".join(f" + {text.path.name}" for text in self.own),
            f"text      {', '.join(dimensions)}: {share:,} calibration tokens each in windows of {recipe.window}; "
            f"to fetch: {self.download_bytes / 2**20:.0f} MiB",
            f"method    {recipe.method}, {recipe.combine}, {cut}, {recipe.layout} layout",
            f"output    {self.out}: model/, gguf/ in {', '.join(recipe.quant)}"
            + (", report/" if recipe.measure else ""),
            f"needs     {self.disk_bytes / 2**30:.1f} GiB disk, {self.memory_bytes / 2**30:.1f} GiB memory, "
            f"roughly {low:.0f} to {high:.0f} minutes without downloads",
        ]
        return "\n".join(lines)

    def minutes(self) -> tuple[float, float]:
        """Rough time from to: the multiplications of all passes over the speed of one matrix product here."""
        import time

        import torch

        a, b = torch.ones(512, 1024), torch.ones(1024, 1024)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        gflops = 2 * 512 * 1024 * 1024 / min(times) / 1e9
        texts = 4 * 3 * self.recipe.eval_tokens if self.recipe.measure else 0
        flops = 2 * self.sizes.parameters * (self.recipe.tokens + texts)
        seconds = flops / (TOKENS_PER_GFLOP * gflops * 1e9) + 30 + (90 if self.recipe.measure else 0)
        return seconds / 60 * 0.7, seconds / 60 * 1.5


def prepare(recipe: Recipe, quants: tuple[str, ...]) -> Prepared:
    """Checks everything that needs no work. Raises one InvalidRequest with every problem found.

    ``quants`` are the types that the exporter can write.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return check()
        except (InvalidRequest, Failed) as error:
            problems.append(str(error))
            return otherwise

    for package in ("torch", "transformers", "llama_cpp", "gguf"):
        if find_spec(package) is None:
            problems.append(f"the package {package} is missing: pip install cusprun")
    if recipe.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            problems.append("--device cuda: torch finds no CUDA device here; write --device cpu")
    problems += [f"--quant {quant}: write one of {', '.join(quants)}" for quant in recipe.quant if quant not in quants]
    scenario = make_scenario(recipe.lang, recipe.domain, recipe.task)
    own = tuple(text for value in recipe.corpus if (text := attempt(partial(parse_own_text, value))))
    dims = dict(pair for value in recipe.dim if (pair := attempt(partial(parse_dimension, value))))
    for path in [*(text.path for text in own), *dims.values()]:
        attempt(partial(read_own, path, path.name, scenario))
    attempt(partial(find_entries, recipe.include))
    download = 0
    if scenario.given():
        attempt(lambda: check_scenario(scenario, own=bool(recipe.corpus), named=recipe.include))
        download = attempt(lambda: download_bytes(all_entries(scenario, recipe.include)), otherwise=0)
    sizes: Sizes | None = attempt(lambda: read_sizes(recipe.model, recipe.revision))
    model_name = recipe.model.rstrip("/").split("/")[-1].removesuffix(".gguf").lower()
    name = recipe.name or "-".join([model_name, str(scenario)]).replace(" ", "-")
    out = (recipe.out or Path("experts") / name).expanduser()
    disk = memory = 0
    if sizes is not None:
        share = recipe.removed_share
        if share is not None:
            attempt(lambda: check_ratio(recipe, share, sizes.anatomy))
        disk, memory = needs(recipe, sizes)
        free = psutil.virtual_memory().available
        if memory > free:
            problems.append(
                f"the build needs about {memory / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free: "
                "close other programs, lower --tokens or take a smaller model"
            )
        place = _existing_parent(out)
        if place.is_dir() and shutil.disk_usage(place).free < disk:
            problems.append(
                f"--out {out}: the build needs about {disk / 2**30:.2f} GiB of disk and "
                f"{shutil.disk_usage(place).free / 2**30:.2f} GiB are free there; choose another folder"
            )
        cache = _existing_parent(cache_folder())
        wanted = download * 3 + (sizes.parameters * 4 if sizes.convert else 0)
        if shutil.disk_usage(cache).free < wanted:
            problems.append(f"the cache {cache_folder()} needs {wanted / 2**30:.2f} GiB: set CUSPRUN_CACHE elsewhere")
    problems += check_out(out, recipe)
    if problems or sizes is None:
        raise InvalidRequest.together(problems)
    return Prepared(recipe, scenario, own, dims, out, name, sizes, download, disk, memory)


def check_ratio(recipe: Recipe, share: float, anatomy: Anatomy) -> None:
    """Raises InvalidRequest where the model cannot lose that share of its parameters."""
    align = recipe.align or default_align(anatomy, recipe.quant)
    if share > (largest := largest_ratio(anatomy, align)):
        raise InvalidRequest(
            f"--ratio {share:g}: embeddings and the smallest widths leave {largest:.2f} of this model to remove; "
            f"write a ratio below {largest:.2f}"
        )


def needs(recipe: Recipe, sizes: Sizes) -> tuple[int, int]:
    """Bytes of disk in the output folder and of memory that the build takes at most, roughly."""
    kept = 1 - (recipe.removed_share or 0.0)
    anatomy = sizes.anatomy
    artifacts = sum(sizes.parameters * kept * BITS[quant] / 8 for quant in recipe.quant)
    model = sizes.parameters * kept * sizes.element_bytes
    scratch = sizes.parameters * kept * 4  # the float32 file that is quantized
    hidden = recipe.tokens * anatomy.hidden_size * 4
    statistics = len(anatomy.layers) * 8 * anatomy.head_dim**2 * anatomy.layers[0].heads ** 2
    disk = model + artifacts + scratch + statistics * 3 / anatomy.layers[0].kv_heads
    layer = anatomy.layer_parameters(anatomy.layers[0]) * 4
    embedding = anatomy.vocab_size * anatomy.hidden_size * 4
    proof = sizes.parameters * kept * 8  # torch and the widest .gguf side by side
    return int(disk * 1.1), int(max(2 * hidden + embedding + 3 * layer, proof) + 2**30 * 0.8)


def check_out(out: Path, recipe: Recipe) -> list[str]:
    """Why ``out`` cannot take this build: it holds something else, or it cannot be written."""
    if out.exists() and not out.is_dir():
        return [f"--out {out} is a file; name a folder"]
    saved = out / "recipe.yaml"
    if saved.is_file():
        if saved.read_text(encoding="utf-8", errors="replace") != recipe.to_yaml():
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


def _existing_parent(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
