"""The frontier of one model: dense in every type, experts by ratio, vocabulary and type, and solved for sizes.

    python -m cusprun.benchmarks.peers.frontier --out docs/results/frontier

Every expert is built unmeasured and its files are kept; then the quality of all is measured on the scenario's held-out
text, and with --repetitions the speed of all in alternation. Writes <out>.json, <out>.csv, <out>.md and <out>.png. What
was built and measured before is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusprun.benchmarks.contenders import REFERENCE, dense_name, every
from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.frontier import Candidate, compare, frontier_table
from cusprun.benchmarks.peers.builds import Builds, Wish, as_words
from cusprun.benchmarks.peers.expert_study import given_words
from cusprun.benchmarks.peers.study_page import table_lines, write_table
from cusprun.corpora.selection import read_texts
from cusprun.dense import find_dense
from cusprun.errors import Failed
from cusprun.exporters.dense_artifacts import DenseArtifacts
from cusprun.files import write_json, written_whole
from cusprun.progress import say

TYPES = "q8_0,iq4_nl"
RATIOS: tuple[Wish, ...] = tuple(
    {"ratio": ratio, "vocab": vocab, "quant": TYPES} for ratio in (0.25, 0.5, 0.125, 0.33) for vocab in ("auto", "keep")
)
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the dense model's q4_0 file, that experts are solved for
FINER = "q4_k_m"  # its dense file is larger than that: solved for the whole size too, so that something has to go


class Frontier(Builds):
    """Artifacts of one model, and where they are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, "frontier")
        key = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]
        self.kept: Path = options.work / "frontier-files" / key

    def wishes(self) -> list[Wish]:
        """All experts, the solved ones first."""
        size = self.dense().gguf_bytes("q4_0")
        return [*({"size": int(share * size)} for share in SHARES), {"size": size, "quant": FINER}, *RATIOS]

    def experts(self, wish: Wish) -> list[Candidate]:
        """The files of one expert, built where they are not kept."""
        folder = self.kept / hashlib.sha256(as_words(wish).encode()).hexdigest()[:16]
        if not (folder / "expert.json").is_file():
            card = self.build(wish)
            folder.mkdir(parents=True, exist_ok=True)
            for artifact in card["artifacts"]:
                shutil.copyfile(self.out / artifact["path"], folder / f"{artifact['quant']}.gguf")
            write_json(folder / "expert.json", card)  # last: it says that the files are there
        card = json.loads((folder / "expert.json").read_text(encoding="utf-8"))
        return [
            Candidate(f"{label(wish, card)} {artifact['quant']}", folder / f"{artifact['quant']}.gguf", "expert")
            for artifact in card["artifacts"]
        ]

    def dense(self) -> DenseArtifacts:
        """The dense model, rounded on the scenario's text; its files need a build before them, their sizes do not."""
        windows = self.out / ".stages" / "windows.safetensors"
        return DenseArtifacts(find_dense(self.options.model), windows, self.out, wish="auto")


def label(wish: Wish, card: dict[str, Any]) -> str:
    """What an expert is called: solved for a size, or the share removed and the vocabulary."""
    if "size" in wish:
        return f"solved for {float(wish['size']) / 1e6:.1f} MB"
    return f"{float(wish['ratio']):.1%} removed, vocabulary {wish['vocab']}"


def wish_holds(rows: Sequence[dict[str, Any]], text: str, whole: int) -> list[str]:
    """For each size that experts were solved for: the best solved expert of it beside the best dense file of it."""
    said = []
    solved = [row for row in rows if row["name"].startswith("solved for")]
    for share in SHARES:
        size = share * whole
        fitting = [[row for row in group if row["file_bytes"] <= size] for group in
                   (solved, [row for row in rows if row["kind"] == "dense"])]  # fmt: skip
        best = [min(group, key=lambda row: row["bits_per_byte"][text], default=None) for group in fitting]
        where = f"{share:.0%} of the dense q4_0 file ({size / 1e6:.1f} MB)"
        expert, dense = best
        if expert is None:
            said.append(f"{where}: no solved expert was built.")
        elif dense is None:
            bits = expert["bits_per_byte"][text]
            said.append(f"{where}: {expert['name']} {bits:.4f} bits per byte; no dense file is as small.")
        else:
            holds = expert["bits_per_byte"][text] < dense["bits_per_byte"][text]
            said.append(
                f"{where}: {expert['name']} {expert['bits_per_byte'][text]:.4f}, {dense['name']} "
                f"{dense['bits_per_byte'][text]:.4f} bits per byte: the expert is {'' if holds else 'not '}better."
            )
    return said


def draw(found: dict[str, Any], path: Path) -> None:
    """Bits per byte over megabytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis, text = figure.subplots(), found["text"]
    kinds = {"dense": [], "solved": [], "expert": []}  # type: dict[str, list[tuple[float, float, str]]]
    for row in found["rows"]:
        kind = "solved" if row["name"].startswith("solved for") else row["kind"]
        kinds[kind].append((row["file_bytes"] / 1e6, row["bits_per_byte"][text], row["quant"]))
    for (kind, points), marker in zip(kinds.items(), "so^", strict=True):
        if points:
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], marker, label=kind, linestyle="none")
    for turn, (x, y, quant) in enumerate(sorted(kinds["dense"])):  # in turn above and below: neighbours stay legible
        axis.annotate(quant, (x, y), (4, 5 if turn % 2 else -11), textcoords="offset points", fontsize=8)
    axis.set_xlabel("file, MB")
    axis.set_ylabel(f"bits per byte, {text}")
    axis.grid(alpha=0.3)
    axis.legend()
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=130)


def write_pages(out: Path, found: dict[str, Any], lines: Sequence[str]) -> None:
    """<out>.json, <out>.csv, <out>.md, <out>.png."""
    write_json(out.with_suffix(".json"), found)
    grid = frontier_table(found)
    rows = [[header.replace("\n", " ") for header in grid.headers], *map(list, grid.rows)]
    write_table(out.with_suffix(".csv"), rows)
    page = ["# Frontier", "", f"`{found['command']}`", "", f"{found['how'].capitalize()}.", "", *table_lines(rows), ""]
    page += [f"![bits per byte over megabytes]({out.name}.png)", "", *(f"- {line}" for line in lines), ""]
    draw(found, out.with_suffix(".png"))
    with written_whole(out.with_suffix(".md")) as part:
        part.write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Builds.add_flags(parser)
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--experts", type=int, help="so many experts at most, for a first look")
    parser.add_argument("--types", nargs="+", default=list(every("auto")), help="of the dense model")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/frontier"))
    options = Builds.read_flags(parser)
    study = Frontier(options)
    candidates: list[Candidate] = []
    for wish in study.wishes()[: options.experts]:
        try:
            candidates += study.experts(wish)
        except Failed as error:
            say(str(error))
    dense = study.dense()
    candidates += [Candidate(dense_name(dense.dense, quant), dense.artifact(quant), "dense") for quant in options.types]
    texts, _ = read_texts(study.out / ".stages" / "texts.jsonl")
    found = compare(
        candidates, texts, reference=dense.artifact(REFERENCE), max_tokens=options.eval_tokens,
        repetitions=None if options.no_speed else options.repetitions, threads=options.threads,
    )  # fmt: skip
    found |= {"settings": study.settings(), "environment": environment()}
    found["command"] = " ".join(["python -m cusprun.benchmarks.peers.frontier", *given_words()])
    whole = cost(dense.artifact("q4_0")).file_bytes
    write_pages(options.out, found, [*wish_holds(found["rows"], found["text"], whole), *found["verdicts"]])
    say(f"written: {options.out}.json, .csv, .md, .png")


if __name__ == "__main__":
    main()
