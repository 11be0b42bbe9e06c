"""Files opened with llama-cpp-python's own class, as other programs open them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import llama_cpp

from cusprun.runtimes.llamacpp import built_with_amx


def open_llama(path: Path, **settings: Any) -> llama_cpp.Llama:
    """A llama_cpp.Llama on one thread; without the matrices of AMX, whose products end the process (built_with_amx)."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = not built_with_amx()
    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", return_value=parameters):
        return llama_cpp.Llama(str(path), n_threads=1, verbose=False, **settings)
