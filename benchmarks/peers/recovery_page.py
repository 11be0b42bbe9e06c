"""What the study of recovery leaves to read: a table of arms and texts, a picture and a page."""

from __future__ import annotations

import csv
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.benchmarks.tally import percent, ratio_stderr
from cusprun.files import written_whole

REFERENCE = "dense"


@dataclass(frozen=True)
class Over:
    """What an arm has over the dense model on one text."""

    increase: float  # of bits per byte, as a share
    stderr: float | None  # of it, paired by window; None of one window

    def __str__(self) -> str:
        return percent(self.increase, self.stderr)


def increases(found: dict[str, Any]) -> dict[str, dict[str, Over]]:
    """By arm and text; nothing is removed from the vocabulary, so that all arms read the same windows."""
    cells = found["cells"]
    dense = cells[REFERENCE]

    def over(cell: dict[str, Any], text: str) -> Over:
        ratio = cell["quality"][text]["bits_per_byte"] / dense["quality"][text]["bits_per_byte"]
        return Over(ratio - 1, ratio_stderr(cell["nats"][text], dense["nats"][text]))

    return {arm: {text: over(cell, text) for text in cell["quality"]} for arm, cell in cells.items()}


def write_csv(path: Path, found: dict[str, Any]) -> None:
    """One row an arm and text."""
    over = increases(found)
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "arm",
                "text",
                "bits_per_byte",
                "increase",
                "increase_stderr",
                "perplexity",
                "tokens",
                "seconds",
                "trained_tokens",
                "parameters",
            ]
        )
        for arm, cell in found["cells"].items():
            trained = cell["recovery"]["tokens"] if cell["recovery"] else 0
            for text, quality in cell["quality"].items():
                rows.writerow(
                    [arm, text, quality["bits_per_byte"], over[arm][text].increase, over[arm][text].stderr,
                     quality["perplexity"], quality["tokens"], cell["seconds"], trained, cell["parameters"]]
                )  # fmt: skip


def draw(path: Path, found: dict[str, Any]) -> None:
    """The increase over dense of each arm, a group of bars a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    over = increases(found)
    texts = list(over[REFERENCE])
    arms = [arm for arm in over if arm != REFERENCE]
    figure, axis = pyplot.subplots(figsize=(2.5 + 1.6 * len(texts), 4), layout="constrained")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places = [text - 0.4 + (number + 0.5) * width for text in range(len(texts))]
        label = f"{arm} ({found['cells'][arm]['seconds']:.0f} s)"
        heights = [100 * one.increase for one in over[arm].values()]
        errors = [100 * (one.stderr or 0) for one in over[arm].values()]
        axis.bar(places, heights, width, yerr=errors, ecolor="0.3", label=label)
    axis.set_xticks(range(len(texts)), texts)
    axis.set_ylabel("bits per byte over dense (%)")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=130)
    pyplot.close(figure)


def command(settings: dict[str, Any], usual: dict[str, Any]) -> str:
    """The command that asks this; ``usual`` are the settings of the command without any option."""
    words = ["python", "-m", "cusprun.benchmarks.peers.recovery"]
    for key, value in settings.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and value != usual[key]:
                shown = Path(each).name if key in ("model", "corpus") else each
                words += [f"--{key.replace('_', '-')}", f"{shown:g}" if isinstance(shown, float) else str(shown)]
    return shlex.join(words)


def sentences(over: dict[str, dict[str, Over]]) -> list[str]:
    """What each text says of the arms, in words."""
    said = []
    for text in over[REFERENCE]:
        arms = {arm: each[text] for arm, each in over.items() if arm != REFERENCE}
        told = ", ".join(f"{arm} {each}" for arm, each in arms.items())
        least = min(arms, key=lambda arm: arms[arm].increase)
        said.append(f"- {text}, bits per byte over dense: {told}; the least is {least}'s.")
    return said


def page(found: dict[str, Any], name: str, usual: dict[str, Any]) -> str:
    """The page under docs/results."""
    settings, cells, over = found["settings"], found["cells"], increases(found)
    texts = list(cells[REFERENCE]["quality"])
    scenario = "-".join(settings[key] for key in ("lang", "domain", "task") if settings[key]) or "the user's own text"
    rows = []
    for arm, cell in cells.items():
        recovery = cell["recovery"]
        trained = f"{recovery['tokens']:,}" if recovery else "–"
        figures = [
            f"{cell['quality'][text]['bits_per_byte']:.3f}" + (f" ({over[arm][text]})" if arm != REFERENCE else "")
            for text in texts
        ]
        rows.append(
            f"| {arm} | {cell['parameters'] / 1e6:.1f} M | {cell['seconds']:.0f} | {trained} | "
            + " | ".join(figures)
            + " |"
        )
    refused = [arm for arm, cell in cells.items() if cell["recovery"] and not cell["recovery"]["kept"]]
    lines = [
        "# Pruning, LoRA and both, at equal time",
        "",
        f"`{command(settings, usual)}`",
        "",
        f"{Path(settings['model']).name}, {scenario}, {settings['tokens']} calibration tokens in windows of "
        f"{settings['window']}, {settings['ratio']:.0%} of all parameters removed by refit, vocabulary kept; learning "
        f"rate {settings['learning_rate']:g}; {found['environment']['cpu']}. Seconds are those of pruning and "
        f"training, text and measuring left out: pruning took {found['pruning_seconds']:.0f} s, recovery after it gets "
        f"{60 * settings['minutes']:.0f} s, LoRA alone both together. Bits per byte on {settings['eval_tokens']:,} "
        "tokens of each held-out text, second half of windows, and their increase over dense ± its standard error, "
        "paired by window. LoRA alone leaves the model as large as it was.",
        "",
        *sentences(over),
        "",
        "| arm | parameters | seconds | trained tokens | " + " | ".join(texts) + " |",
        "| --- |" + " --- |" * (3 + len(texts)),
        *rows,
        "",
        f"![bits per byte over dense]({name}.png)",
    ]
    if refused:
        lines[-1:-1] = [
            f"The training of {', '.join(refused)} made the held-out calibration windows worse; its weights are those "
            "from before it.",
            "",
        ]
    return "\n".join(lines) + "\n"
