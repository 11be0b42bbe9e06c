"""What stays in memory, and what is given back: what a layer took, the next one finds whole again."""

from __future__ import annotations

import ctypes
import sys

HELD_BYTES = 2**29  # of one kind, at most, that is kept because it will be wanted again
M_MMAP_THRESHOLD = -3  # mallopt(3)


def return_large_blocks() -> None:
    """From now on blocks of 1 MiB and more go back to the system when they are freed, on Linux with glibc.

    Left to itself glibc raises that bound to 32 MiB as it sees larger blocks freed, keeps what is smaller, and what
    a process holds then depends on where such blocks happened to lie.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def release_freed() -> None:
    """Asks the C library to hand free pages back, on Linux with glibc; does nothing elsewhere.

    glibc keeps blocks of up to 32 MiB for itself, and over many layers they lie so scattered that the process holds
    far more than is in use.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
