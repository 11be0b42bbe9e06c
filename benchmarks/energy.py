"""Joules of a phase, where the machine counts them: Intel's and AMD's RAPL on Linux, NVML on CUDA.

Both count the whole package or device, whoever uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """Counters in microjoules with the value at which each starts over; none where nothing is counted."""

    read: Callable[[], tuple[int, ...]]
    wraps: tuple[int, ...]
    note: str  # what is counted, or why nothing is

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
        """Energy between two readings, of less than one turn of the counters."""
        if not before:
            return None
        spent = (
            end - start if end >= start else end + wrap - start
            for start, end, wrap in zip(before, after, self.wraps, strict=True)
        )  # fmt: skip
        return sum(spent) / 1e6


def open_meter(device: str, powercap: Path = POWERCAP) -> Meter:
    """The meter of the processor's packages, or of the first CUDA device."""
    if device == "cuda":
        return _nvml()
    zones = [
        zone for zone in sorted(powercap.glob("*-rapl:*"))
        if (zone / "name").is_file() and (zone / "name").read_text().startswith("package")
    ]  # fmt: skip
    if not zones:
        return Meter(tuple, (), "this machine reports no energy (no RAPL package below /sys/class/powercap)")

    def read() -> tuple[int, ...]:
        return tuple(int((zone / "energy_uj").read_text()) for zone in zones)

    try:
        read()
    except PermissionError:
        return Meter(tuple, (), "RAPL's counters are not readable here: root may allow it with chmod a+r energy_uj")
    wraps = tuple(int((zone / "max_energy_range_uj").read_text()) for zone in zones)
    return Meter(read, wraps, f"RAPL, {len(zones)} package(s), all that ran on them")


def _nvml() -> Meter:
    if find_spec("pynvml") is None:
        return Meter(tuple, (), "the device's energy needs the package nvidia-ml-py")
    import pynvml

    handle = first_device()

    def read() -> tuple[int, ...]:
        return (1000 * int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)),)

    try:
        read()
    except pynvml.NVMLError as error:
        return Meter(tuple, (), f"the device reports no energy: {error}")
    return Meter(read, (2**63,), "NVML, first CUDA device, all that ran on it")


def first_device() -> Any:
    """NVML's handle of the first CUDA device. Raises pynvml.NVMLError where it has none."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(0)
