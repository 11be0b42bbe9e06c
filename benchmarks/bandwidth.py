"""The machine's own copy bandwidth, what a decode step is held against: STREAM's copy in numpy, one slice a thread.

Bytes read and bytes written both count, as in STREAM (https://www.cs.virginia.edu/stream/ref.html); the best of the
passes is the machine's. Meant for a process of its own.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

BUFFER_BYTES = 2**28  # of source and of target, less where memory is short
PASSES = 12


def measure_copy(threads: int, buffer_bytes: int | None = None, passes: int = PASSES) -> dict[str, Any]:
    """Best and all passes in bytes per second, and how they were taken."""
    import psutil

    size = buffer_bytes or min(BUFFER_BYTES, psutil.virtual_memory().available // 8)
    words = size // 8
    source, target = np.empty(words), np.empty(words)
    edges = np.linspace(0, words, threads + 1).astype(int)
    slices = [slice(start, end) for start, end in pairwise(edges)]

    def touch(part: slice) -> None:
        source[part] = 1.0
        target[part] = 0.0

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])  # numpy lets go of the interpreter's lock meanwhile

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(touch, slices))
        for _ in range(passes + 1):
            start = time.perf_counter()
            list(pool.map(copy, slices))
            rates.append(2 * 8 * words / (time.perf_counter() - start))
    return {
        "bytes_per_s": max(rates[1:]),
        "threads": threads,
        "buffer_bytes": 8 * words,
        "samples": rates[1:],
        "how": f"numpy copy of {8 * words / 2**20:.0f} MiB on {threads} threads, read + written, best of {passes}",
    }
