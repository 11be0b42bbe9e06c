"""One expert and its dense model in every format: bytes, bits per byte, prefill and decode, all in one run.

    python -m cusprun.benchmarks.peers.exports EXPERT --out docs/results/exports

EXPERT is the folder that `cusprun-edge build` left; its held-out text is evaluated on. Every artifact is exported anew
without an importance matrix unless --imatrix takes one of the calibration text. With --builder the dense model that
onnxruntime-genai's own builder makes in int4 is measured beside ours of the same settings (pip install
onnxruntime-genai). Writes <out>.json, <out>.csv and <out>.md; what is measured already is not measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.peers.expert_study import ExpertStudy, run_study
from cusprun.benchmarks.peers.study_page import table_lines, write_table
from cusprun.benchmarks.quality import evaluate_corpora
from cusprun.benchmarks.speed import bench, ratios
from cusprun.corpora.selection import read_texts
from cusprun.errors import Failed
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from cusprun.files import folder_written_whole, written_whole
from cusprun.formats import format_of
from cusprun.quants import is_weighed

TYPES = ("q8_0", "q4_0", "iq4_nl", "fp32", "int8", "int4")
BUILDER = "int4 of onnxruntime-genai's builder"
LIKE_BUILDER = "int4, output layer in 4 bits"


class Exports(ExpertStudy):
    """Artifacts of one expert and its dense model, and what was measured of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {"eval_tokens": options.eval_tokens, "repetitions": options.repetitions}
        super().__init__("cusprun.benchmarks.peers.exports", options, settings, ("quality", "speed"))

    def artifact(self, side: str, label: str) -> Path:
        """The .gguf or ONNX folder of one side in one type; written where it is not there."""
        if label == BUILDER:
            return self._built()
        quant = label.partition(",")[0]
        if format_of(quant) == "onnx":
            path = self.work / f"{side}-{label.replace(', ', '-').replace(' ', '-')}"
            if not path.is_dir():
                export_onnx(self.folders[side], path, quant, output_bits=4 if label == LIKE_BUILDER else 8)
            return path
        weighed = self.options.imatrix and is_weighed(quant)
        path = self.work / f"{side}-{quant}{'-imatrix' if weighed else ''}.gguf"
        if not path.is_file():
            matrix = next((self.expert / "gguf").glob("*.imatrix"), None) if weighed and side == "expert" else None
            if weighed and matrix is None:
                from cusprun.exporters.imatrix import imatrix_of_text

                matrix = imatrix_of_text(self.folders[side], self.options.imatrix, path.with_suffix(".imatrix"), 16384)
            export_gguf(self.folders[side], path, quant, imatrix=matrix)
        return path

    def _built(self) -> Path:
        path = self.work / "dense-builder"
        if not path.is_dir():
            with folder_written_whole(path) as part:
                command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.dense.folder)]
                command += ["-o", str(part), "-p", "int4", "-e", "cpu", "-c", str(self.work / "builder-cache")]
                command += ["--extra_options", "int4_accuracy_level=4"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise Failed(f"onnxruntime-genai's builder failed: {done.stderr[-2000:]}")
        return path

    def measure(self, labels: Sequence[str]) -> None:
        """Everything that is not measured yet; the record is written after each."""
        texts, _ = read_texts(self.expert / ".stages" / "texts.jsonl")
        for label in labels:
            if label in (BUILDER, LIKE_BUILDER):
                continue
            if label not in self.found["quality"]:
                expert, dense = self.artifact("expert", label), self.artifact("dense", label)
                pairs = evaluate_corpora(
                    expert, texts, against=dense, max_tokens=self.options.eval_tokens, threads=self.options.threads,
                    special=True,
                )  # fmt: skip
                self.found["quality"][label] = {name: asdict(pair) for name, pair in pairs.items()}
                self.save()
        for label in labels:
            if label not in self.found["speed"]:
                sides = ("dense", BUILDER) if label == LIKE_BUILDER else ("expert", "dense")
                if label == BUILDER:
                    continue
                paths = [self.artifact(side, label) if side != BUILDER else self._built() for side in sides]
                rows = bench(paths, repetitions=self.options.repetitions, threads=self.options.threads)
                self.found["speed"][label] = {
                    "rows": [{**row.as_json(), "artifact": path.name} for row, path in zip(rows, paths, strict=True)],
                    "ratios": ratios(*rows),
                    "bytes": [cost(path).file_bytes for path in paths],
                }
                self.save()


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the heading first: one type each."""
    texts = list(next(iter(found["quality"].values())))
    heading = ["type", "MB dense", "MB expert", "decode", "prefill", "decode over bytes"]
    rows = [heading + [f"{name} {side}" for name in texts for side in ("dense", "expert")]]
    for label, speed in found["speed"].items():
        if label == LIKE_BUILDER:
            continue
        decode, prefill = (speed["ratios"][key]["median_of_pairs"] for key in ("decode_tps", "prefill_tps"))
        cells = [label, *(f"{size / 1e6:.1f}" for size in speed["bytes"][::-1])]
        cells += [f"{decode:.2f}×", f"{prefill:.2f}×", f"{speed['ratios']['decode_yield']['median_of_pairs']:.2f}"]
        for name in texts:
            pair = found["quality"][label][name]
            cells += [f"{pair['against']['bits_per_byte']:.4f}", f"{pair['artifact']['bits_per_byte']:.4f}"]
        rows.append(cells)
    return rows


def write_page(out: Path, found: dict[str, Any]) -> None:
    """<out>.csv and <out>.md."""
    rows = table(found)
    write_table(out.with_suffix(".csv"), rows)
    settings = found["settings"]
    lines = [
        "# One expert in every format",
        "",
        f"`{found['command']}`",
        "",
        f"{settings['expert']}, {settings['removed']:.1%} of {settings['base']} removed, on "
        f"{found['environment']['cpu']}, {settings['threads'] or 'all physical'} threads. Decode and prefill are the "
        "expert's tokens per second over the dense model's in the same type, median of alternating pairs; *decode over "
        "bytes* is the decode ratio times the ratio of the files: 1 where every byte saved is time saved. The rest are "
        f"bits per byte on held-out text of {settings['eval_tokens']} tokens, dense and expert.",
        "",
        *table_lines(rows),
        "",
    ]
    if LIKE_BUILDER in found["speed"]:
        speed = found["speed"][LIKE_BUILDER]["ratios"]
        decode, prefill = (speed[key] for key in ("decode_tps", "prefill_tps"))
        lines += [
            f"Beside {BUILDER} (blocks of 32, output layer in 4 bits, both), the dense model in the same run: decode "
            f"{decode['median_of_pairs']:.2f}×, prefill {prefill['median_of_pairs']:.2f}× (ours computes logits of the "
            "last position alone where it is told to), bytes "
            f"{speed['file_bytes']['exact']:.2f}×, each as median of {decode['pairs']} pairs.",
            "",
        ]
    with written_whole(out.with_suffix(".md")) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--builder", action="store_true", help="measure onnxruntime-genai's own int4 too")
    parser.add_argument("--imatrix", type=Path, help="text of which an importance matrix is taken")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)

    def run(options: argparse.Namespace) -> None:
        exports = Exports(options)
        exports.measure([*options.types, *([LIKE_BUILDER] if options.builder else [])])
        write_page(options.out, exports.found)

    run_study("exports", parser, Path("docs/results/exports"), run)


if __name__ == "__main__":
    main()
