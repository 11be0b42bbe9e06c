"""What the study of recovery leaves to read: a table of arms and texts, a picture and a page."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from cusprun.files import written_whole

REFERENCE = "dense"


def increases(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By arm and text, bits per byte over those of the dense model, minus 1."""
    cells = found["cells"]
    dense = {text: quality["bits_per_byte"] for text, quality in cells[REFERENCE]["quality"].items()}
    return {
        arm: {text: quality["bits_per_byte"] / dense[text] - 1 for text, quality in cell["quality"].items()}
        for arm, cell in cells.items()
    }


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
                    [arm, text, quality["bits_per_byte"], over[arm][text], quality["perplexity"], quality["tokens"],
                     cell["seconds"], trained, cell["parameters"]]
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
        axis.bar(places, [100 * over[arm][text] for text in texts], width, label=label)
    axis.set_xticks(range(len(texts)), texts)
    axis.set_ylabel("bits per byte over dense (%)")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=130)
    pyplot.close(figure)


def page(found: dict[str, Any], name: str) -> str:
    """The page under docs/results."""
    settings, cells, over = found["settings"], found["cells"], increases(found)
    texts = list(cells[REFERENCE]["quality"])
    scenario = "-".join(settings[key] for key in ("lang", "domain", "task") if settings[key]) or "the user's own text"
    rows = []
    for arm, cell in cells.items():
        recovery = cell["recovery"]
        trained = f"{recovery['tokens']:,}" if recovery else "–"
        figures = [
            f"{cell['quality'][text]['bits_per_byte']:.3f}" + (f" ({over[arm][text]:+.1%})" if arm != REFERENCE else "")
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
        f"`python -m cusprun.benchmarks.peers.recovery --minutes {settings['minutes']:g}`",
        "",
        f"{Path(settings['model']).name}, {scenario}, {settings['tokens']} calibration tokens in windows of "
        f"{settings['window']}, {settings['ratio']:.0%} of all parameters removed by refit, vocabulary kept; learning "
        f"rate {settings['learning_rate']:g}; {found['environment']['cpu']}. Seconds are those of pruning and "
        f"training, text and measuring left out: pruning took {found['pruning_seconds']:.0f} s, recovery after it gets "
        f"{60 * settings['minutes']:.0f} s, LoRA alone both together. Bits per byte on held-out text and their change "
        "against dense.",
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
