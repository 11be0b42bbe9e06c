"""What this machine is: processor, memory, disk, energy counters, and instructions that a library leaves unused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.corpora.cache import cache_folder

# What llama.cpp's kernels gain most by: its name for it, and the system's.
INSTRUCTIONS = {"AVX2": "avx2", "AVX512": "avx512f", "NEON": "asimd", "MATMUL_INT8": "i8mm"}


@dataclass(frozen=True)
class Machine:
    """Facts that need no try."""

    system: str
    python: str
    executable: str
    cpu: str
    instruction_sets: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int | None
    memory_bytes: int
    memory_free_bytes: int
    load_average: float | None
    folder: str  # the current one
    disk_free_bytes: int  # there
    cache: str
    cache_free_bytes: int
    energy: str  # what counts it, or why nothing does
    counts_energy: bool


def look_around() -> Machine:
    """The machine as it is now."""
    import sys

    import psutil

    from cusprun.benchmarks.energy import open_meter
    from cusprun.benchmarks.environment import environment

    facts: dict[str, Any] = environment()
    meter = open_meter("cpu")
    here, cache = Path.cwd(), cache_folder()
    return Machine(
        system=facts["system"], python=facts["python"], executable=sys.executable, cpu=facts["cpu"],
        instruction_sets=tuple(facts["instruction_sets"]), physical_cores=facts["physical_cores"],
        logical_cores=facts["logical_cores"], memory_bytes=facts["memory_bytes"],
        memory_free_bytes=psutil.virtual_memory().available, load_average=facts["load_average"],
        folder=str(here), disk_free_bytes=shutil.disk_usage(here).free,
        cache=str(cache), cache_free_bytes=shutil.disk_usage(_existing(cache)).free,
        energy=meter.note, counts_energy=bool(meter.wraps),
    )  # fmt: skip


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def unused_instructions(instruction_sets: tuple[str, ...], system_info: str) -> list[str]:
    """Instructions that the processor has and llama.cpp was compiled without, by its own ``system_info``."""
    pairs = (part.rpartition(":")[2].partition("=") for part in system_info.split("|"))
    compiled = {name.strip() for name, _, value in pairs if value.strip() == "1"}
    return [theirs for theirs, ours in INSTRUCTIONS.items() if ours in instruction_sets and theirs not in compiled]
