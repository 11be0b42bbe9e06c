"""What a device allows an expert: bytes of its file, memory, tokens per second."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

UNITS = {
    "": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


def parse_bytes(value: str) -> int:
    """Bytes of a size such as 60MB, 512MiB or 2G (gguf-split's 2GB). Raises ValueError where it is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B?)", value.strip().upper())
    size = float(found[1]) * UNITS[found[2]] if found and found[2] in UNITS else 0.0
    if not 1 <= size < math.inf:
        raise ValueError(f"{value!r} is no size: write a number with KB, MB, GB, KiB, MiB or GiB, such as 60MB")
    return int(size)


@dataclass(frozen=True)
class Budget:
    """What is allowed; None where nothing was said."""

    size: int | None = None  # bytes of the file, of an ONNX folder all its files
    ram: int | None = None  # bytes, peak of the process that `bench` measures
    speedup: float | None = None  # decode over that of the dense model in the same type
    tps: float | None = None  # decoded tokens per second

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())

    @property
    def timed(self) -> bool:
        """Whether the device has to be measured."""
        return any(value is not None for value in (self.ram, self.speedup, self.tps))

    def words(self) -> str:
        """As on the command line."""
        return " ".join(
            f"--{name} {show_wish(name, value)}" for name, value in asdict(self).items() if value is not None
        )


def show_wish(name: str, value: float, up: bool | None = None) -> str:
    """A wish's value as it is written; rounded up or down where ``up`` says so."""
    turn: Callable[[float], int] = round if up is None else math.ceil if up else math.floor
    if name in ("size", "ram"):
        unit, suffix = (10**6, "MB") if value >= 10**7 else (10**3, "KB")
        tenths = turn(value / unit * 10) / 10
        return f"{tenths:g}{suffix}"
    return f"{turn(value * 100) / 100:g}"
