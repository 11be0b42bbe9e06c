"""Whether a bench repeats itself: two of one file, one file beside itself, and beside itself slowed down.

    python -m cusprun.benchmarks.peers.repeatability FILE --pairs 10 --out docs/results/repeatability

In turn, as often as --pairs says: two benches of FILE alone (does the interval of one hold the mean of the other?), one
of FILE beside itself (does the interval of the ratio hold 1?) and one of FILE, every call of its runtime --slowdown
longer, beside itself (does the interval of the ratio lie below 1?). Each ends by the rule of `cusprun-edge bench`.
Writes <out>.json and <out>.md after each; what is measured already is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusprun.benchmarks.answer_store import artifact_sha256
from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.peers.expert_study import given_words
from cusprun.benchmarks.peers.study_page import table_lines
from cusprun.benchmarks.speed import bench, ratios
from cusprun.corpora.cache import cache_folder
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import write_json, written_whole
from cusprun.progress import say

PAIR = ("first", "second", "same", "slowed")
WANTED = 0.9  # of the pairs


class Repeatability:
    """The record of one file: for each pair what its four benches found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._path: Path = options.out.with_suffix(".json")
        machine = environment()
        settings = {
            "artifact": options.artifact.name, "sha256": artifact_sha256(options.artifact), "cpu": machine["cpu"],
            **{name: getattr(options, name) for name in
               ("prefill", "decode", "depth", "threads", "until", "max_seconds", "slowdown")},
        }  # fmt: skip
        self.found: dict[str, Any] = {"settings": settings, "pairs": []}
        if self._path.is_file():
            saved = _read(self._path)
            if saved["settings"] == settings:
                self.found = saved
        self.found["environment"] = machine
        self.found["command"] = " ".join(["python -m cusprun.benchmarks.peers.repeatability", *given_words()])

    def measure(self, pairs: int) -> None:
        """What is missing of ``pairs``; record and page are written after each bench."""
        with tempfile.TemporaryDirectory() as folder:
            beside = Path(folder) / f"beside-{self.options.artifact.name}"
            beside.symlink_to(self.options.artifact.resolve())
            for index in range(pairs):
                if index == len(self.found["pairs"]):
                    self.found["pairs"].append({})
                pair = self.found["pairs"][index]
                for what in PAIR:
                    if what not in pair:
                        pair[what] = self._bench(what, beside)
                        self.save()
                        say(f"pair {index + 1} of {pairs}: {what} done")

    def _bench(self, what: str, beside: Path) -> dict[str, Any]:
        """Tests of one file by name, or the ratios of two."""
        options, alone = self.options, what in ("first", "second")
        rows = bench(
            [options.artifact] if alone else [options.artifact, beside],
            prefill=options.prefill, decode=options.decode, depth=options.depth, repetitions=None,
            until=options.until, max_seconds=options.max_seconds, threads=options.threads,
            slowdowns=[options.slowdown, 0.0] if what == "slowed" else None,
            kept=cache_folder() / "bench" / what,
        )  # fmt: skip
        if any(test.tps.ci95 is None for test in rows[0].tests):
            raise InvalidRequest(
                f"one round took longer than --max-seconds {options.max_seconds:g}, and an interval needs two: "
                "write more seconds"
            )
        figures = {test.test: test.tps.__dict__ for test in rows[0].tests}
        return {
            "rounds": rows[0].rounds,
            "stopped": rows[0].stopped,
            "measured_at": rows[0].measured_at,
            "tests": figures if alone else ratios(*rows)["tests"],
            "samples_s": [{test.test: test.samples_s for test in row.tests} for row in rows],
        }

    def save(self) -> None:
        """Writes <out>.json and, once a pair is whole, <out>.md."""
        write_json(self._path, self.found)
        if any(len(pair) == len(PAIR) for pair in self.found["pairs"]):
            with written_whole(self.options.out.with_suffix(".md")) as part:
                part.write_text("\n".join(page(_read(self._path))) + "\n", encoding="utf-8")


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For every test and question how many of the whole pairs answered it as they should, and how precise they were."""
    whole = [pair for pair in found["pairs"] if len(pair) == len(PAIR)]
    truth = 1 / (1 + found["settings"]["slowdown"])
    answers = []
    for test in whole[0]["first"]["tests"]:
        alone = [(pair["first"]["tests"][test], pair["second"]["tests"][test]) for pair in whole]
        same, slowed = ([pair[what]["tests"][test] for pair in whole] for what in ("same", "slowed"))
        apart = [abs(one["mean"] / other["mean"] - 1) for one, other in alone]
        answers += [
            _answer(test, "the other's mean, in the interval for another bench", alone, "again95", apart),
            _answer(test, "the other's mean, in the interval of the mean", alone, "ci95", apart),
            _counted(
                test, "1, in the ratio's interval beside itself", [_holds(one["ci95"], 1.0) for one in same], same
            ),
            _counted(test, "slower, by the ratio's interval below 1", [one["ci95"][1] < 1 for one in slowed], slowed),
            _counted(test, f"{truth:.3f}, in that interval", [_holds(one["ci95"], truth) for one in slowed], slowed),
        ]
    return answers


def _answer(
    test: str, question: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], key: str, apart: Sequence[float]
) -> dict[str, Any]:
    right = [_holds(one[key], other["mean"]) for one, other in pairs]
    width = statistics.median((one[key][1] - one[key][0]) / 2 / one["mean"] for one, _ in pairs)
    return _entry(test, question, right, width) | {"largest_difference": max(apart)}


def _counted(test: str, question: str, right: Sequence[bool], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    width = statistics.median((one["ci95"][1] - one["ci95"][0]) / 2 / one["of_pairs"] for one in found)
    return _entry(test, question, right, width) | {"median_ratio": statistics.median(one["of_pairs"] for one in found)}


def _entry(test: str, question: str, right: Sequence[bool], width: float) -> dict[str, Any]:
    from scipy.stats import binomtest

    low, high = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return {
        "test": test, "question": question, "right": sum(right), "pairs": len(right), "wilson95": [low, high],
        "enough": sum(right) >= WANTED * len(right), "half_width": width,
    }  # fmt: skip


def _holds(interval: Sequence[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def page(found: dict[str, Any]) -> list[str]:
    """The page's lines."""
    settings, machine = found["settings"], found["environment"]
    whole = [pair for pair in found["pairs"] if len(pair) == len(PAIR)]
    rounds = [pair[what]["rounds"] for pair in whole for what in PAIR]
    rows = [["test", "held or found", "of", "share, 95 %", "half width", "largest difference or median ratio"]]
    for answer in judge(found):
        low, high = answer["wilson95"]
        seen = (
            f"{answer['largest_difference']:.1%}"
            if "largest_difference" in answer
            else f"{answer['median_ratio']:.3f}×"
        )
        rows.append([
            answer["test"], answer["question"], f"{answer['right']} of {answer['pairs']}", f"{low:.0%} – {high:.0%}",
            f"{answer['half_width']:.1%}", seen,
        ])  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [
        "# Does a bench repeat itself", "", f"`{found['command']}`", "",
        f"{settings['artifact']} on {machine['cpu']} ({machine['physical_cores']} cores), "
        f"{settings['threads'] or machine['physical_cores']} threads, {machine['system']}; {versions}; "
        f"{_busy(machine['load_average'])}. "
        f"Rounds until every standard error was below {settings['until']:.1%} and that of a ratio below half of it, "
        f"at most {settings['max_seconds']:.0f} s a bench: {min(rounds)} to {max(rounds)} rounds, a fresh process "
        f"each. One of the two was slowed by {settings['slowdown']:.0%} where that is asked. A 95 % interval of the "
        "mean holds the mean of another bench in 83 of 100 cases, for the other errs too; the interval for another "
        "bench is wider by the root of two.", "",
        *table_lines(rows),
    ]  # fmt: skip


def _busy(load: float | None) -> str:
    return "load unknown" if load is None else f"{load:.1f} processes busy when the command was last given"


def _read(path: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="a .gguf file, ONNX or model folder")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--slowdown", type=float, default=0.05, help="share of its time that each call takes longer")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--until", type=float, default=0.02, help="standard error that ends a bench, a share")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="longest bench")
    parser.add_argument("--out", type=Path, default=Path("docs/results/repeatability"))
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: write 1 or more")
    if not options.slowdown > 0:
        parser.error(f"--slowdown {options.slowdown:g}: write more than 0, such as 0.05")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        study = Repeatability(options)
        study.measure(options.pairs)
        study.save()
    except (InvalidRequest, Failed) as error:
        raise SystemExit(f"repeatability: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    print("\n".join(page(study.found)))


if __name__ == "__main__":
    main()
