"""What layers, heads, rows and types cost on one device in seconds and memory: what `build` solves for it by.

The dense model's shape and narrower variants of it (:mod:`cusprun.additive`) are exported with noise for weights (zeros
run faster than any model), and each is run in alternation in fresh processes. A profile is of one shape of model and
one device; what was measured here is kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cusprun.additive import ROW_SHARE, WHOLE, Table, variants
from cusprun.allocation import default_align
from cusprun.anatomy import Anatomy
from cusprun.benchmarks.environment import machine
from cusprun.benchmarks.speed import bench
from cusprun.corpora.cache import cache_folder
from cusprun.dense import Dense, find_dense
from cusprun.errors import InvalidRequest
from cusprun.exporters.hollow import write_hollow
from cusprun.files import write_json
from cusprun.formats import format_of
from cusprun.layouts import choose_limits
from cusprun.progress import say, track
from cusprun.quants import TYPES
from cusprun.recipe import SOLVED_IN
from cusprun.runtimes import default_threads
from cusprun.vocabulary import close, read_pieces

SCHEMA_VERSION = 3
ROUNDS = 5
PREFILL, DECODE = 512, 64  # tokens of each run
LAYER_PARAMETERS = 2 * 10**8  # of all layers of what is run; larger models are stood for by fewer layers
FEWEST_LAYERS = 4
STEADY = 0.1  # runs that scatter by more are not kept


@dataclass(frozen=True)
class TypeProfile:
    """Tables of one type: seconds of a decoded token, bytes of peak memory; and what was measured."""

    seconds: Table
    memory: Table
    runs: dict[str, dict[str, list[float]]]  # variant -> decode_s (a token), peak_rss_bytes, every run

    def scatter(self) -> float:
        """How far the runs of a shape lie apart: the median over the shapes of half their interquartile range, as a
        share of their median."""
        found = []
        for run in self.runs.values():
            low, middle, high = statistics.quantiles(run["decode_s"], n=4)
            found.append((high - low) / 2 / middle)
        return statistics.median(found)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TypeProfile:
        return cls(Table.from_json(value["seconds"]), Table.from_json(value["memory"]), value["runs"])


@dataclass(frozen=True)
class Profile:
    """One device and one shape of model, by type."""

    shape: dict[str, Any]
    device: dict[str, Any]  # environment, threads, cpu or cuda
    types: dict[str, TypeProfile]

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(self)})


def shape_of(anatomy: Anatomy) -> dict[str, Any]:
    """What has to be the same for a profile to hold."""
    return {
        "family": anatomy.family.name,
        "hidden_size": anatomy.hidden_size,
        "head_dim": anatomy.head_dim,
        "vocab_size": anatomy.vocab_size,
        "tied": anatomy.tied,
        "layers": [list(asdict(layer).values()) for layer in anatomy.layers],
    }


def read_profile(path: Path, anatomy: Anatomy, quants: Sequence[str]) -> Profile:
    """A profile that `bench --profile` wrote, for this model and these types.

    Raises InvalidRequest where it is none, of another model, or lacks a type.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value["schema_version"]
        types = {quant: TypeProfile.from_json(one) for quant, one in value["types"].items()}
        profile = Profile(value["shape"], value["device"], types)
    except OSError as error:
        raise InvalidRequest(f"--device-profile {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidRequest(
            f"--device-profile {path} is no profile: write one on the device with cusprun-edge bench MODEL --profile"
        ) from error
    if version != SCHEMA_VERSION:
        raise InvalidRequest(f"--device-profile {path} has version {version} and this cusprun reads {SCHEMA_VERSION}")
    if profile.shape != shape_of(anatomy):
        raise InvalidRequest(
            f"--device-profile {path} is of a model with other sizes: write one of this model on the device with "
            "cusprun-edge bench MODEL --profile FILE"
        )
    if missing := [quant for quant in quants if quant not in types]:
        raise InvalidRequest(
            f"--device-profile {path} has {', '.join(types)} and not {missing[0]}: write one of these with --quant, or "
            f"the profile anew with bench --quant {missing[0]}"
        )
    return profile


def take_profile(
    dense: Path,
    anatomy: Anatomy,
    quants: Sequence[str],
    *,
    align: int,
    attention_goes: bool,
    threads: int | None = None,
    device: str = "cpu",
    repetitions: int = ROUNDS,
) -> Profile:
    """The profile of this device for the model folder ``dense``; what was measured before is taken from the cache."""
    used = threads or default_threads()
    where = {"environment": machine(), "threads": used, "device": device}
    types = {}
    for quant in quants:
        settings = [
            SCHEMA_VERSION,
            shape_of(anatomy),
            where,
            quant,
            align,
            attention_goes,
            repetitions,
            PREFILL,
            DECODE,
        ]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        path = cache_folder() / "profiles" / f"{key[:32]}.json"
        if not path.is_file():
            types[quant] = _measure(dense, anatomy, quant, align, attention_goes, used, device, repetitions)
            if (scatter := types[quant].scatter()) > STEADY:
                say(f"runs of one shape differ by {scatter:.0%}, the machine is busy: measured anew next time")
            else:
                write_json(path, asdict(types[quant]))
        else:
            types[quant] = TypeProfile.from_json(json.loads(path.read_text(encoding="utf-8")))
    return Profile(shape_of(anatomy), where, types)


def profile_device(
    model: str, path: Path, quants: Sequence[str] = (), *, threads: int | None = None, device: str = "cpu"
) -> Profile:
    """Writes the profile of this device for a dense model, as --device-profile takes it, in types joined by commas.

    Raises InvalidRequest before anything is measured where a type is none or ``path`` cannot be written.
    """
    types = [part for value in quants for part in value.split(",") if part] or list(SOLVED_IN["gguf"])
    for quant in types:
        if format_of(quant) == "gguf" and TYPES[quant].needs_imatrix:
            raise InvalidRequest(f"--quant {quant} needs an importance matrix and is not solved for: name another")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidRequest(f"--profile {path}: name a file in a folder that is there")
    found = profile_of(find_dense(model), types, threads=threads, device=device)
    found.save(path)
    return found


def profile_of(dense: Dense, quants: Sequence[str], *, threads: int | None = None, device: str = "cpu") -> Profile:
    """:func:`take_profile` of a dense model as a build without further wishes takes it."""
    gguf = any(format_of(quant) == "gguf" for quant in quants)
    limits = choose_limits(dense.anatomy, None, export=gguf)
    return take_profile(
        dense.folder, dense.anatomy, quants, align=default_align(dense.anatomy, quants),
        attention_goes=limits.attention_goes, threads=threads, device=device,
    )  # fmt: skip


def at_present(profile: Profile, dense: Path, anatomy: Anatomy) -> Profile:
    """The profile of this device, its seconds as long as the dense model's are now.

    A machine is not always as fast as on the day of its profile: the dense shape is run anew in the first type, and
    the tables of all are scaled by what it takes now over what it took.
    """
    quant, kept = next(iter(profile.types)), fewer_rows(dense, anatomy)
    with tempfile.TemporaryDirectory(prefix="cusprun-profile-") as scratch:
        artifact = _write(dense, standing_for(anatomy), kept, quant, Path(scratch))
        (row,) = bench(
            [artifact], prefill=PREFILL, decode=DECODE, repetitions=ROUNDS, threads=profile.device["threads"],
            device=profile.device["device"],
        )  # fmt: skip
    then = statistics.median(profile.types[quant].runs[WHOLE]["decode_s"])
    factor = 1 / statistics.median(row.samples["decode_tps"]) / then
    say(f"the dense model decodes at {1 / factor:.2f} times the speed it had when this device was measured")
    types = {name: replace(one, seconds=one.seconds.scaled(factor)) for name, one in profile.types.items()}
    return replace(profile, types=types)


def _measure(
    dense: Path,
    anatomy: Anatomy,
    quant: str,
    align: int,
    attention_goes: bool,
    threads: int,
    device: str,
    repetitions: int,
) -> TypeProfile:
    say(f"measuring what layers, heads and rows cost in {quant} on this device; kept for later builds")
    layers, kept = len(anatomy.layers), fewer_rows(dense, anatomy)
    shapes = variants(standing_for(anatomy), align=align, attention_goes=attention_goes, rows=len(kept))
    with tempfile.TemporaryDirectory(prefix="cusprun-profile-") as scratch:
        artifacts = {}
        for number, (name, sizes) in enumerate(track(shapes.items(), f"{quant}: shapes to measure", total=len(shapes))):
            artifacts[name] = _write(dense, sizes, kept, quant, Path(scratch) / str(number))
        rows = bench(
            list(artifacts.values()), prefill=PREFILL, decode=DECODE, repetitions=repetitions, threads=threads,
            device=device, kept=cache_folder() / "bench",
        )  # fmt: skip
    runs = {
        name: {
            "decode_s": [1 / tps for tps in row.samples["decode_tps"]],
            "peak_rss_bytes": row.samples["peak_rss_bytes"],
        }
        for name, row in zip(shapes, rows, strict=True)
    }
    seconds = {name: statistics.median(run["decode_s"]) for name, run in runs.items()}
    memory = {name: max(run["peak_rss_bytes"]) for name, run in runs.items()}
    return TypeProfile(Table.of(shapes, seconds, layers), Table.of(shapes, memory, layers), runs)


def standing_for(anatomy: Anatomy) -> Anatomy:
    """The model that is measured: the first of its layers, as many as LAYER_PARAMETERS come to."""
    layers = anatomy.layers
    each = sum(map(anatomy.layer_parameters, layers)) / len(layers)
    count = max(FEWEST_LAYERS, int(LAYER_PARAMETERS / each))
    return anatomy.with_layers([layer if index < count else None for index, layer in enumerate(layers)])


def fewer_rows(dense: Path, anatomy: Anatomy) -> list[int]:
    """Token ids of a smaller vocabulary that is whole by itself, all where the tokenizer cannot be trimmed."""
    try:
        pieces = read_pieces(dense)
    except InvalidRequest:
        return list(range(anatomy.vocab_size))
    return sorted(close(pieces, range(round(ROW_SHARE * anatomy.vocab_size))))


def _write(dense: Path, sizes: Anatomy, kept: Sequence[int], quant: str, folder: Path) -> Path:
    """The shape as an artifact of the type."""
    hollow = folder / "model"
    write_hollow(dense, sizes, hollow, kept if sizes.vocab_size == len(kept) else None, noise=True)
    if format_of(quant) == "onnx":
        from cusprun.exporters.onnx import OnnxExport

        return OnnxExport(hollow, quant, name=WHOLE).write(folder / "onnx").path
    from cusprun.exporters.gguf import GgufExport

    return GgufExport(hollow, quant, name=WHOLE).write(folder / "model.gguf").path
