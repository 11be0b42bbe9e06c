"""Importance matrix: how large the inputs of every matrix are, by column, for llama.cpp's quantizer to weigh errors by.

The file is llama.cpp's own: a GGUF of type ``imatrix`` with Σ x² and the count of tokens for each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.document import Scenario
from cusprun.corpora.own import read_own
from cusprun.corpora.packing import pack_windows
from cusprun.exporters.gguf_tensors import gguf_name
from cusprun.exporters.imatrix_file import Imatrix, write_imatrix
from cusprun.layerwise import LayerwiseModel
from cusprun.progress import track

WINDOW = 512


@torch.no_grad()
def collect_imatrix(model_dir: Path, windows: Mapping[str, np.ndarray], device: str = "cpu") -> Imatrix:
    """Takes windows of token ids, (n, window) a text, through the model folder, one layer in memory at a time.

    Every matrix of the layers is in it, and the output matrix where it is none of the embeddings'. Raises
    InvalidRequest where there is no text or a window is longer than the model reads.
    """
    anatomy = describe(model_dir)
    model = LayerwiseModel(model_dir, anatomy, device, fast=True)
    batches = model.embed_texts(windows)
    sums: dict[str, np.ndarray] = {}
    for index in track(range(len(anatomy.layers)), "importance matrix, layer by layer"):
        with model.layer(index) as layer:
            modules = {  # of matrices that are one in the file, and read the same inputs, one
                gguf_name(anatomy, f"{anatomy.prefix(index)}{name}.weight")[0]: module
                for name, module in layer.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            names = {module: name for name, module in modules.items()}
            totals = {name: torch.zeros(module.in_features, dtype=torch.float64) for module, name in names.items()}

            def add(module: Any, inputs: tuple[torch.Tensor], _: Any, names: Any = names, totals: Any = totals) -> None:
                totals[names[module]] += inputs[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64).cpu()

            handles = [module.register_forward_hook(add) for module in names]
            batches = [model.forward(layer, batch.to(device)) for batch in batches]
            for handle in handles:
                handle.remove()
            sums |= {name: total.numpy() for name, total in totals.items()}
    if not anatomy.tied:
        with model.final_norm() as norm:
            total = sum(norm(batch).flatten(0, 1).square().sum(0, dtype=torch.float64).cpu() for batch in batches)
            assert isinstance(total, torch.Tensor)
            sums[gguf_name(anatomy, anatomy.family.output)[0]] = total.numpy()
    return Imatrix(sums, sum(ids.size for ids in windows.values()), max(ids.shape[1] for ids in windows.values()))


def imatrix_of_text(model_dir: Path, corpus: Path, path: Path, tokens: int) -> Path:
    """The importance matrix of a model folder on about ``tokens`` tokens of the user's text, written to ``path``.

    All of the text may be read: what is evaluated later has to be other text. Raises InvalidRequest where the text is
    missing, in no form that is read, or too short.
    """
    write_imatrix(path, collect_imatrix(model_dir, read_windows(model_dir, corpus, tokens)), [corpus.name])
    return path


def read_windows(model_dir: Path, corpus: Path, tokens: int) -> dict[str, np.ndarray]:
    """About ``tokens`` tokens of the user's text in windows, (n, window), under its name.

    Raises InvalidRequest where the text is missing, in no form that is read, or too short.
    """
    documents = read_own(corpus, f"file:{corpus.name}", Scenario())
    return {corpus.name: pack_windows(documents, load_tokenizer(model_dir), tokens, WINDOW, seed=0)}
