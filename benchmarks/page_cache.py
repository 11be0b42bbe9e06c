"""The system's cache of file pages: filled before a warm load, emptied before a cold one, no rights needed.

Linux drops clean pages that no process has mapped (posix_fadvise); what is left is counted (mincore), for a load is
cold only where nothing is. A virtual machine's host may still hold the file.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cusprun.as_llama import as_llama
from cusprun.runtimes import is_onnx

PIECE = 2**22  # bytes


def files_of(artifact: Path) -> list[Path]:
    """What is read when an artifact is loaded: every part of a .gguf, every file of a folder.

    Of a folder that runs as a Llama the files of that Llama, which is written here if it was not yet.
    """
    if artifact.is_dir():
        folder = artifact if is_onnx(artifact) else as_llama(artifact)
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    from cusprun.runtimes.gguf_header import load_metadata

    return list(load_metadata(artifact).parts)


def fill(files: Sequence[Path]) -> None:
    """Reads the files once, so that the next to read them finds them in memory."""
    buffer = bytearray(PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: Sequence[Path]) -> str | None:
    """Drops the files' pages; None where that worked, else why a load would not be cold."""
    if not hasattr(os, "posix_fadvise"):
        return "this system drops no file from its page cache on request"
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not on the disk yet stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    share = resident_share(files)
    return None if share < 0.01 else f"{share:.0%} of the file stayed in the page cache: another process has it open"


def renew(files: Sequence[Path]) -> str | None:
    """Reads the files anew into pages of the smallest size (Linux); why they could not be dropped before.

    How a file came into the page cache decides in how large pieces it lies there, and those decide how fast a mapped
    file is read: SmolLM2's expert decoded 112, 106, 101 and 93 tokens/s after reads of 128 KiB and of 4 MiB, just
    written, and in pages of 4 KiB. Reading as for random access keeps the kernel from allocating larger ones.
    """
    note = drop(files)
    buffer = bytearray(PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while file.readinto(buffer):
                pass
    return note


def resident_share(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in memory (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = os.sysconf("SC_PAGE_SIZE")
    resident = total = 0
    for path in files:
        data = np.memmap(path, mode="r")
        pages = -(-data.size // page)
        found = np.zeros(pages, np.uint8)
        address, vector = ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(found.ctypes.data)
        if libc.mincore(address, ctypes.c_size_t(data.size), vector) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        resident += int((found & 1).sum())
        total += pages
    return resident / max(total, 1)
