"""What a measurement ran on: processor, threads, memory, versions; a figure without these says little."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("cusprun", "torch", "transformers", "llama-cpp-python", "gguf", "onnxruntime", "numpy")
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
VECTORS = re.compile(r"sse4_[12]|avx.*|f16c|fma|bmi2|amx.*|asimd.*|sve.*|sme|sme2.*|i8mm|bf16|neon")


def machine() -> dict[str, Any]:
    """:func:`environment` without what changes from minute to minute: where this differs, figures are measured anew."""
    found = environment()
    del found["load_average"]
    return found


def environment() -> dict[str, Any]:
    """CPU name and cores, memory in bytes, system, Python and package versions; no heavy import.

    ``load_average`` is the number of busy processes over the last minute: what ran beside the measurement shows there.
    """
    import psutil

    return {
        "cpu": cpu_name(),
        "instruction_sets": instruction_sets(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package)) is not None},
    }


def cpu_name() -> str:
    """The processor as its maker calls it, or the architecture where the system does not tell."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "Model"):
                return value.strip()
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The vector and matrix instructions that the kernels of runtimes choose by, as the system names them."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return [flag for flag in value.split() if VECTORS.fullmatch(flag)]
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-a"], capture_output=True, text=True).stdout.splitlines()
        pairs = (line.partition(": ") for line in found if line.startswith("hw.optional.arm.FEAT_"))
        return sorted(name.rpartition("FEAT_")[2].lower() for name, _, value in pairs if value == "1")
    return []


def last_level_cache_bytes() -> int | None:
    """Size of the first core's largest cache, None where the system does not tell; of a virtual machine the host's."""
    found = []
    for path in CACHES.glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            found.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(found, default=None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
