"""Every family in every layout and type, run by its runtimes beside torch: the table of docs/results/formats.md.

    python -m tests.exporters.matrix --out docs/results/formats

Tiny random models, as in the tests. A cell is the mean KL divergence to torch in nats and how often the first choice is
torch's, or the number of the reason why there is no file. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.as_llama import as_llama
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.study_page import table_lines
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from cusprun.exporters.proof import check_graph, compare_on_windows
from cusprun.files import write_json, written_whole
from cusprun.formats import format_of
from cusprun.runtimes import Sampling, open_runtime
from tests.exporters.models import make, windows
from tests.pico import save_model

SCALAR = {"query_pre_attn_scalar": 16, "sliding_window": 24}
# row -> family and settings of the config; Qwen2 and Phi-3 are read as the Llama that computes the same
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied, biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "gemma2": ("gemma2", SCALAR),
    "gemma3_text": ("gemma3_text", {**SCALAR, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"tie_word_embeddings": False, "sliding_window": None}),
}
AS_LLAMA = ("qwen2", "phi3")
LAYOUTS = ("uniform", "per-layer", "without-attention")
TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_k_m", "q4_0", "iq4_nl", "fp32", "fp16", "int8", "int4")
GENAI = "onnxruntime-genai"  # opens the folders in fp32 and int4 and says the same as we do
TOKENS = 16


@dataclass
class Matrix:
    """Cells by row and column; a cell is a figure or a reason."""

    cells: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def reasons(self) -> list[str]:
        """Why cells are empty, each once."""
        return list(dict.fromkeys(c["reason"] for row in self.cells.values() for c in row.values() if "reason" in c))

    def rows(self) -> list[list[str]]:
        """The table as text, the heading first."""
        reasons = self.reasons()
        found = [["family", "layout", *TYPES, GENAI]]
        for name, row in self.cells.items():
            found.append([*name.split("/"), *(_text(row[column], reasons) for column in found[0][2:])])
        return found


def _text(cell: dict[str, Any], reasons: list[str]) -> str:
    if "reason" in cell:
        return f"[{reasons.index(cell['reason']) + 1}]"
    if "same" in cell:
        return f"{cell['same']}/{cell['said']}"
    return f"{cell['kld_mean']:.0e} {cell['top1_agreement']:.0%}"


def model(folder: Path, name: str, layout: str) -> Path:
    """The tiny model of a row. Raises InvalidRequest where there is none in this layout."""
    family, settings = MODELS[name]
    if name in AS_LLAMA:
        if layout != "uniform":
            raise InvalidRequest(f"an expert of {name} is one of llama: see there")
        return as_llama(save_model(folder, family, **settings))
    if layout == "without-attention" and family.startswith("gemma"):
        raise InvalidRequest("torch's cache of Gemma asks its first layers for their text: attention stays in all")
    layers = {"num_hidden_layers": 5} if layout == "without-attention" else {}
    if layout == "per-layer":
        layers = {"num_hidden_layers": 3}
    return make(folder, family=family, layout=layout, **{**settings, **layers})


def measure(name: str, layout: str, columns: tuple[str, ...] = (*TYPES, GENAI)) -> dict[str, dict[str, Any]]:
    """One row: what each column's file is beside torch, or why there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CUSPRUN_CACHE"] = str(Path(scratch) / "cache")
        try:
            folder = model(Path(scratch) / "model", name, layout)
        except InvalidRequest as error:
            return {column: {"reason": str(error)} for column in columns}
        np.save(Path(scratch) / "windows.npy", windows(folder))
        return {column: _cell(folder, column, Path(scratch) / f"{column}") for column in columns}


def _cell(folder: Path, column: str, out: Path) -> dict[str, Any]:
    try:
        if column == GENAI:
            return _genai(folder, out)
        if format_of(column) == "gguf":
            artifact = out.with_suffix(".gguf")
            export_gguf(folder, artifact, column, name="tiny")  # "phi3": llama.cpp would look for Phi-3's own tokens
        else:
            artifact = out
            export_onnx(folder, artifact, column)
            check_graph(str(artifact))
    except InvalidRequest as error:
        return {"reason": str(error)}
    found = compare_on_windows(str(artifact), str(folder), str(out.parent / "windows.npy"), column, 1)
    assert found["tokenizer_equal"], found["tokenizer_difference"]
    return {key: found[key] for key in ("kld_mean", "top1_agreement")}


def _genai(folder: Path, out: Path) -> dict[str, Any]:
    import onnxruntime_genai

    same = said = 0
    for quant in ("fp32", "int4"):
        artifact = out.with_name(f"genai-{quant}")
        export_onnx(folder, artifact, quant)
        ids = windows(folder)[0][:TOKENS].tolist()
        loaded = onnxruntime_genai.Model(str(artifact))
        parameters = onnxruntime_genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=2 * TOKENS, do_sample=False)
        generator = onnxruntime_genai.Generator(loaded, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        told = [int(token) for token in generator.get_sequence(0)][TOKENS:]
        ours = list(open_runtime(artifact, threads=1).generate(ids, Sampling(max_tokens=TOKENS)))
        said += len(ours)
        same += sum(a == b for a, b in zip(told, ours, strict=False))
    return {"same": same, "said": said}


def write_page(out: Path, matrix: Matrix) -> None:
    """<out>.json and <out>.md."""
    write_json(out.with_suffix(".json"), {"environment": environment(), "cells": matrix.cells})
    lines = [
        "# Formats",
        "",
        "`python -m tests.exporters.matrix`",
        "",
        "Tiny random models of every family and layout, in every type: the mean KL divergence to torch in float32, in "
        "nats, and how often the first choice is torch's; below, why there is no file. Types up to iq4_nl are GGUF, "
        f"run by llama.cpp, the others ONNX, run by onnxruntime. {GENAI}: how many of its tokens are ours, "
        "in fp32 and int4, when it opens the folders by itself. f32 and fp32 show that a file is the model, the others "
        "what rounding does to random weights. Columns of 64 divide by no 256, so q4_k_m falls back here.",
        "",
        *table_lines(matrix.rows()),
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(matrix.reasons(), 1)),
        "",
    ]
    with written_whole(out.with_suffix(".md")) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/formats"))
    options = parser.parse_args()
    matrix = Matrix()
    for name in MODELS:
        for layout in LAYOUTS:
            matrix.cells[f"{name}/{layout}"] = measure(name, layout)
    write_page(options.out, matrix)


if __name__ == "__main__":
    main()
