"""An ONNX model folder in plain onnxruntime: the graph, and a cache that is written in place.

Runs what cusprun exports, and other decoders in onnxruntime-genai's form that read ids, mask and cache alone. Needs
numpy and onnxruntime only and is copied into every folder that is exported, beside run.py. The cache is allocated once
at full length: each layer's past_key_values.N and present.N are bound to the same buffer, and attention_mask says how
much of it is filled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PAST, PRESENT = "past_key_values.", "present."
KEEP = "logits_to_keep"  # an input that may be left out: the last positions that logits are computed for


class OnnxSession:
    """One sequence in one graph.

    ``context`` is the most tokens that the cache holds, ``threads`` 0 takes the physical cores, ``provider`` is CPU
    or CUDA. ``filled`` may be lowered: the cache then holds the tokens before it.
    """

    def __init__(self, folder: Path, *, context: int = 2048, threads: int = 0, provider: str = "CPU") -> None:
        self.config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        name = str(self.config["decoder"]["filename"])
        if Path(name).name != name:
            raise ValueError(f"the graph {name} lies outside the folder")
        graph = folder / name
        providers = [f"{provider}ExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=providers)
        self.context = min(context, int(self.config["context_length"]))
        end = self.config.get("eos_token_id", [])
        self.end_tokens = frozenset(end if isinstance(end, list) else [end])
        self.filled = 0
        device = "cuda" if provider == "CUDA" else "cpu"
        self._cache: dict[str, Any] = {}
        self._trims = KEEP in [value.name for value in self._session.get_overridable_initializers()]
        decoder = self.config["decoder"]
        for value in self._session.get_inputs():
            if value.name.startswith(PAST):
                heads, size = value.shape[1], value.shape[3]  # numbers, or names where all layers are alike
                heads = heads if isinstance(heads, int) else int(decoder["num_key_value_heads"])
                shape = (1, heads, self.context, size if isinstance(size, int) else int(decoder["head_size"]))
                empty = np.zeros(shape, np.float16 if "float16" in value.type else np.float32)
                self._cache[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty, device, 0)
            elif value.name not in ("input_ids", "attention_mask"):
                raise ValueError(f"the graph wants an input {value.name}, which is not given here")

    def append(self, tokens: Sequence[int], rows: int = 1) -> np.ndarray:
        """Appends tokens to the cache; logits after the last ``rows`` of them (0: all), (rows, vocabulary) float32.

        Raises ValueError where they do not fit.
        """
        filled = self.filled + len(tokens)
        if filled > self.context:
            raise ValueError(f"{filled} tokens do not fit a context of {self.context}")
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, filled), dtype=np.int64))
        if self._trims:
            keep = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([rows], dtype=np.int64))
            binding.bind_ortvalue_input(KEEP, keep)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace(PAST, PRESENT), value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        self.filled = filled
        found: np.ndarray = binding.get_outputs()[-1].numpy()[0]
        return found[-rows:]
