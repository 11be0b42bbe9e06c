"""Experts solved for a device: what was predicted before each build, and what was measured of it.

    python -m cusprun.benchmarks.peers.solved --out docs/results/solved

Builds one expert for each wish below, all of one scenario on one device, measures file, decode and peak memory of
expert and dense model in alternation, and writes <out>.json, <out>.csv and <out>.md. A wish that was measured is not
built again; text, losses and the device's profile are shared by all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.builds import Builds, Wish, as_words
from cusprun.benchmarks.peers.expert_study import given_words
from cusprun.benchmarks.peers.study_page import table_lines, write_table
from cusprun.benchmarks.speed import bench, ratios
from cusprun.errors import Failed
from cusprun.files import write_json, written_whole
from cusprun.progress import say

# Flags of build; tps is in shares of the dense model's in eight bits on this device, as the profile has it.
WISHES: tuple[Wish, ...] = (
    {"size": "100MB"},
    {"size": "80MB"},
    {"size": "60MB"},
    {"size": "45MB"},
    {"size": "100MB", "quant": "q8_0"},
    {"size": "70MB", "quant": "int4"},
    {"speedup": 1.25, "quant": "q8_0"},
    {"speedup": 1.5, "quant": "q8_0"},
    {"speedup": 2.0, "quant": "q8_0"},
    {"speedup": 1.5, "quant": "q4_0"},
    {"tps": 1.4, "quant": "q8_0,q4_0"},
    {"tps": 1.8, "quant": "q8_0,q4_0"},
    {"ram": "220MB", "quant": "q8_0"},
    {"ram": "180MB", "quant": "q8_0,q4_0"},
    {"size": "75MB", "speedup": 1.4, "quant": "q8_0,q4_0"},
    {"speedup": 1.4, "quant": "int8"},
)
LIMITS = {"file_bytes": 0.01, "decode_tps": 0.10, "speedup": 0.10, "peak_rss_bytes": 0.10}  # promised


class Solved(Builds):
    """Experts solved for wishes, and what is measured of them."""

    def measure(self, wish: Wish) -> dict[str, Any]:
        """Predicted and measured figures of one wish, which also asks for a token a second: then speed is predicted."""
        expert = self.build({"tps": 1, **wish})
        (artifact,), solved = expert["artifacts"], expert["method"]["solved"]
        rows = bench(
            [self.out / artifact["path"], self.dense(artifact["quant"])],
            repetitions=self.options.repetitions,
            threads=self.options.threads,
        )
        both = ratios(*rows)
        return {
            "wish": wish,
            "quant": artifact["quant"],
            "removed": expert["method"]["removed_share"],
            "predicted_nats": expert["method"]["predicted_nats_per_token"] + solved["rounding"],
            "predicted": {name: solved[name] for name in LIMITS if name in solved},
            "measured": {
                "file_bytes": artifact["bytes"],
                "decode_tps": statistics.median(rows[0].samples["decode_tps"]),
                "dense_decode_tps": statistics.median(rows[1].samples["decode_tps"]),
                "peak_rss_bytes": rows[0].peak_rss_bytes,
                "speedup": both["decode_tps"]["median_of_pairs"],
            },
        }

    def dense(self, quant: str) -> Path:
        """The dense model in the type; its speed does not hang on how it was rounded."""
        from cusprun.dense import find_dense
        from cusprun.exporters.dense_artifacts import DenseArtifacts

        dense = find_dense(self.options.model)
        return DenseArtifacts(dense, self.out, self.out, wish="nearest").artifact(quant)

    def dense_tps(self) -> float:
        """Decoded tokens per second of the dense model in eight bits, as this device's profile has them."""
        from cusprun.benchmarks.profile import profile_of
        from cusprun.dense import find_dense

        profile = profile_of(find_dense(self.options.model), ["q8_0"], threads=self.options.threads)
        return 1 / profile.types["q8_0"].seconds.whole


def table(cells: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text, the heading first: predicted → measured with the error, a wish each."""
    rows = [["wish", "type", "removed", "nats", "file, MB", "error", "decode, tokens/s", "error", "× dense", "error",
             "memory, MB", "error", "machine"]]  # fmt: skip
    for cell in cells:
        row = [as_words(cell["wish"]), cell["quant"], f"{cell['removed']:.1%}", f"{cell['predicted_nats']:.2f}"]
        for name, unit in (("file_bytes", 1e6), ("decode_tps", 1), ("speedup", 1), ("peak_rss_bytes", 1e6)):
            digits = 2 if name == "speedup" else 1
            measured = cell["measured"][name] / unit
            if name not in cell["predicted"]:
                row += [f"{measured:.{digits}f}", ""]
                continue
            predicted = cell["predicted"][name] / unit
            row += [f"{predicted:.{digits}f} → {measured:.{digits}f}", f"{predicted / measured - 1:+.1%}"]
        rows.append([*row, f"{machine(cell):.2f}"])
    return rows


def machine(cell: dict[str, Any]) -> float:
    """How fast the dense model ran beside the expert, over how fast it ran when the wish was solved."""
    solved = cell["predicted"]["decode_tps"] / cell["predicted"]["speedup"]
    return float(cell["measured"]["dense_decode_tps"] / solved)


def sentences(cells: list[dict[str, Any]]) -> list[str]:
    """How many predictions are within what is promised."""
    said = []
    for name, limit in LIMITS.items():
        errors = [cell["predicted"][name] / cell["measured"][name] - 1 for cell in cells if name in cell["predicted"]]
        if errors:
            within = sum(abs(error) <= limit for error in errors)
            median = statistics.median(map(abs, errors))
            said.append(
                f"{name}: {within} of {len(errors)} predictions within {limit:.0%} of what was measured, the largest "
                f"error {max(errors, key=abs):+.1%}, the median of their sizes {median:.1%}."
            )
    if cells:
        speeds = [machine(cell) for cell in cells]
        said.append(
            f"The machine itself, by the dense model's decode, ran at {min(speeds):.2f} to {max(speeds):.2f} of its "
            "speed when the wish was solved: decode_tps errs by that, too, speedup does not."
        )
    return said


def write_pages(out: Path, found: dict[str, Any]) -> None:
    """<out>.json, <out>.csv and <out>.md."""
    cells = list(found["cells"].values())
    write_json(out.with_suffix(".json"), found)
    rows = table(cells)
    write_table(out.with_suffix(".csv"), rows)
    lines = ["# Solved for a device", "", f"`{found['command']}`", ""]
    lines += ["Predicted before the build → measured of what came out, decode and memory as medians and peaks of "
              f"{found['settings']['repetitions']} runs in alternation with the dense model.", ""]  # fmt: skip
    lines += [*table_lines(rows), "", *(f"- {line}" for line in sentences(cells)), ""]
    with written_whole(out.with_suffix(".md")) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Builds.add_flags(parser)
    parser.add_argument("--wishes", type=int, nargs="+", help="numbers of the wishes, from 0; default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/solved"))
    options = Builds.read_flags(parser)
    study, path = Solved(options, "solved"), options.out.with_suffix(".json")
    settings = study.settings()
    found: dict[str, Any] = {"settings": settings, "cells": {}}
    if path.is_file() and (saved := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        found = saved
    found["command"] = " ".join(["python -m cusprun.benchmarks.peers.solved", *given_words()])
    found["environment"] = environment()
    for number in options.wishes or range(len(WISHES)):
        wish = dict(WISHES[number])
        if as_words(wish) in found["cells"]:
            continue
        asked = {**wish, "tps": round(float(wish["tps"]) * study.dense_tps(), 1)} if "tps" in wish else wish
        try:
            found["cells"][as_words(wish)] = study.measure(asked)
        except Failed as error:
            say(str(error))
            continue
        write_pages(options.out, found)
    say(f"written: {options.out}.json, .csv, .md")


if __name__ == "__main__":
    main()
