"""One expert and its dense model in four bits, rounded in every way there is: bits per byte on held-out text.

    python -m cusprun.benchmarks.peers.rounding EXPERT --out docs/results/rounding

EXPERT is the folder that `cusprun-edge build` left: its calibration windows give the importance matrix and what GPTQ
rounds by, as in a build, its held-out text is evaluated on. Beside them the model unrounded, in f16 and in fp32. Writes
<out>.json, <out>.csv and <out>.md; what is measured already is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.peers.expert_study import ExpertStudy, run_study
from cusprun.benchmarks.peers.study_page import table_lines, write_table
from cusprun.benchmarks.quality import evaluate_corpora
from cusprun.corpora.selection import read_texts
from cusprun.exporters.artifacts import sample_windows
from cusprun.exporters.compensation import Roundings
from cusprun.exporters.gguf import GgufExport
from cusprun.exporters.imatrix import collect_imatrix
from cusprun.exporters.imatrix_file import write_imatrix
from cusprun.exporters.onnx import OnnxExport
from cusprun.files import written_whole
from cusprun.formats import format_of
from cusprun.onnx_types import TYPES as ONNX
from cusprun.quants import TYPES as GGUF

TYPES = ("q4_0", "iq4_nl", "int4")
WHOLE = {"gguf": "f16", "onnx": "fp32"}  # what rounding is measured from
SIDES = ("dense", "expert")


class RoundingStudy(ExpertStudy):
    """Artifacts of one expert and its dense model by side, type and rounding."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("cusprun.benchmarks.peers.rounding", options, {"eval_tokens": options.eval_tokens}, ("cells",))
        stages = options.expert / ".stages"
        trimmed = stages / "windows-trimmed.safetensors"
        windows = {"dense": stages / "windows.safetensors"}
        windows["expert"] = trimmed if trimmed.is_file() else windows["dense"]
        self._windows = {side: sample_windows(path) for side, path in windows.items()}
        self.work.mkdir(parents=True, exist_ok=True)
        self._roundings = {side: Roundings(self.folders[side], self._sampled(side), self.work) for side in SIDES}

    def _sampled(self, side: str) -> Callable[[], dict[str, np.ndarray]]:
        return lambda: self._windows[side]

    def _imatrix(self, side: str) -> Path:
        path = self.work / f"{side}.imatrix"
        if not path.is_file():
            write_imatrix(path, collect_imatrix(self.folders[side], self._windows[side]), list(self._windows[side]))
        return path

    def artifact(self, side: str, quant: str, rounding: str) -> Path:
        """The .gguf or ONNX folder; written where it is not there."""
        if format_of(quant) == "onnx":
            path = self.work / f"rounding-{side}-{quant}-{rounding}"
            if not path.is_dir():
                onnx = OnnxExport(self.folders[side], quant)
                onnx.write(path, self._roundings[side].for_export(rounding, onnx))
            return path
        path = self.work / f"rounding-{side}-{quant}-{rounding}.gguf"
        if not path.is_file():
            matrix = self._imatrix(side) if rounding in ("imatrix", "gptq") else None
            gguf = GgufExport(self.folders[side], quant, weighed=matrix is not None)
            gguf.write(path, matrix, compensated=self._roundings[side].for_export(rounding, gguf))
        return path

    def measure(self) -> None:
        """Everything that is not measured yet; the record is written after each."""
        texts, _ = read_texts(self.options.expert / ".stages" / "texts.jsonl")
        for side in SIDES:
            for quant, rounding in cells(self.options.types):
                name = f"{side}/{quant}/{rounding}"
                if name in self.found["cells"]:
                    continue
                path = self.artifact(side, quant, rounding)
                pairs = evaluate_corpora(
                    path, texts, max_tokens=self.options.eval_tokens, threads=self.options.threads, special=True
                )
                quality = {
                    text: {"bits_per_byte": pair.artifact.bits_per_byte, "perplexity": pair.artifact.perplexity}
                    for text, pair in pairs.items()
                }
                self.found["cells"][name] = {"bytes": cost(path).file_bytes, "texts": quality}
                self.save()


def cells(types: list[str]) -> list[tuple[str, str]]:
    """Type and rounding of every artifact of a side: unrounded ones first."""
    whole = dict.fromkeys(WHOLE[format_of(quant)] for quant in types)
    rounded = [
        (quant, rounding)
        for quant in types
        for rounding in (("nearest", "imatrix", "gptq") if format_of(quant) == "gguf" else ("nearest", "gptq"))
    ]
    return [*((quant, "none") for quant in whole), *rounded]


def table(found: dict[str, Any], types: list[str]) -> list[list[str]]:
    """Rows of text, the heading first, an artifact each. *Closed*: the share of the way from nearest to unrounded."""
    texts = list(next(iter(found["cells"].values()))["texts"])
    rows = [
        ["model", "type", "rounding", "MB", *(f"{text} {what}" for text in texts for what in ("", "ppl", "closed"))]
    ]
    for side in SIDES:
        for quant, rounding in cells(types):
            cell = found["cells"][f"{side}/{quant}/{rounding}"]
            row = [side, quant, rounding, f"{cell['bytes'] / 1e6:.1f}"]
            for text in texts:
                value = cell["texts"][text]
                row += [f"{value['bits_per_byte']:.4f}", f"{value['perplexity']:.2f}", ""]
                if rounding in ("imatrix", "gptq"):
                    nearest, whole = (
                        found["cells"][f"{side}/{name}"]["texts"][text]["bits_per_byte"]
                        for name in (f"{quant}/nearest", f"{WHOLE[format_of(quant)]}/none")
                    )
                    row[-1] = f"{(nearest - value['bits_per_byte']) / (nearest - whole):.0%}"
            rows.append(row)
    return rows


def write_page(out: Path, found: dict[str, Any], types: list[str]) -> None:
    """<out>.csv and <out>.md."""
    rows = table(found, types)
    write_table(out.with_suffix(".csv"), rows)
    settings = found["settings"]
    lines = [
        "# Rounding",
        "",
        f"`{found['command']}`",
        "",
        f"{settings['expert']}, {settings['removed']:.1%} of {settings['base']} removed, and its dense model. For each "
        f"held-out text, of {settings['eval_tokens']} tokens: bits per byte, perplexity per token, and the share of "
        "the way from nearest rounding back to the unrounded model. Perplexities of the two models are in tokens of "
        "their own. With text llama.cpp gives some matrices other types than without, so files differ in size.",
        "",
        *table_lines(rows),
        "",
    ]
    with written_whole(out.with_suffix(".md")) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=(*GGUF, *ONNX))
    parser.add_argument("--eval-tokens", type=int, default=4096)

    def run(options: argparse.Namespace) -> None:
        study = RoundingStudy(options)
        study.measure()
        write_page(options.out, study.found, options.types)

    run_study("rounding", parser, Path("docs/results/rounding"), run)


if __name__ == "__main__":
    main()
