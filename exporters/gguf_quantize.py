"""llama.cpp's quantizer: a .gguf in plain types in, a quantized one out, or only the types that it would have.

Both functions run in a child process, for llama.cpp may abort; nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from cusprun.errors import Failed
from cusprun.exporters.imatrix_file import read_imatrix
from cusprun.runtimes import llamacpp

_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+\d+ "
    r"\(required for type\s+(\w+)\).*?-> falling back to\s+(\w+)"
)
_TENSOR = re.compile(
    r"\[\s*\d+/\s*\d+\] (\S+)\s+- \[[\d, ]+\], type =\s+(\w+), size =\s+[\d.]+ MiB(?: ->\s+[\d.]+ MiB \((\w+)\))?"
)


def quantize_file(
    source: str, out: str, file_type: int, threads: int, imatrix: str | None, types: Mapping[str, str]
) -> None:
    """Quantizes one .gguf into another; ``types`` gives single tensors the type of that name.

    Raises Failed with llama.cpp's reason.
    """
    llamacpp.quiet()
    means = read_imatrix(Path(imatrix)) if imatrix is not None else None
    parameters = _parameters(file_type, threads, means, types)
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters)) != 0:
        raise Failed(f"llama.cpp does not quantize {source}: {llamacpp.logged()}")


def try_types(hollow: str, file_type: int, weighed: bool, types: Mapping[str, str]) -> dict[str, Any]:
    """What the quantizer would make of a file of which only the header is there: llama.cpp's own dry run.

    ``weighed`` says that there will be an importance matrix. Returns ``types``, by tensor, and ``fallbacks``, rows of
    tensor, columns, type meant and type taken; types in upper case, as :mod:`gguf` writes them. llama.cpp tells them in
    its log alone. Raises Failed with llama.cpp's reason.
    """
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", errors="replace"))

    llamacpp.quiet()
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    means = {"": np.zeros(1, dtype=np.float32)} if weighed else None  # that there is one changes the mix
    parameters = _parameters(file_type, 1, means, types)
    parameters.dry_run = True
    code = llama_cpp.llama_model_quantize(os.fsencode(hollow), os.fsencode(hollow) + b".out", ctypes.byref(parameters))
    log = "".join(lines)
    if code != 0:
        reason = re.search(r"failed to quantize: (.*)", log)
        raise Failed(f"llama.cpp does not quantize this model: {reason[1] if reason else log[-500:]}")
    return {
        "types": {name: (then or now).upper() for name, now, then in _TENSOR.findall(log)},
        "fallbacks": [
            (name, int(columns), meant.upper(), taken.upper()) for name, columns, meant, taken in _FALLBACK.findall(log)
        ],
    }


def _parameters(file_type: int, threads: int, means: Mapping[str, np.ndarray] | None, types: Mapping[str, str]) -> Any:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads
    if means is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the last, empty one ends the list
        for entry, (name, values) in zip(entries, means.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    if types:
        changes = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
        for change, (name, kind) in zip(changes, types.items(), strict=False):
            change.pattern = f"^{re.escape(name)}$".encode()
            change.type = int(gguf.GGMLQuantizationType[kind.upper()])
        parameters.tt_overrides = changes
    return parameters
