"""The page, table and picture of the study of smaller vocabularies."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from cusprun.files import written_whole
from cusprun.recipe import DEFAULT_MODEL, DEFAULT_TOKENS, WINDOW

METHODS = {
    "frequency": f"counts in {DEFAULT_TOKENS} calibration tokens, the later token of equal ones first",
    "frequency, all text": "counts in all calibration-side text",
    "expected loss": "expected count x measured cost of the split, in all calibration-side text",
}
PROMISED_AT, NEAR = 0.07, 0.005  # share of all parameters
PROMISED_OF = (DEFAULT_MODEL, "en-legal-qa")
PROMISES = {"scenario": 0.005, "general": 0.03}


def as_csv(found: dict[str, Any]) -> str:
    """One line for each method, size and text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "removed_rows", "share_of_parameters", "text", "bits_per_byte", "increase", "stderr"])
    for row in found["cells"]:
        for name, values in row["texts"].items():
            figures = [f"{values[key]:.5f}" for key in ("bits_per_byte", "increase", "stderr")]
            writer.writerow([row["method"], row["removed"], f"{row['share']:.4f}", name, *figures])
    return text.getvalue()


def as_page(found: dict[str, Any], name: str) -> str:
    """The table for people."""
    settings, dense, note = found["settings"], found["dense"], found["prices"]
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in found["weights"].items())
    names = list(dense["nats"])
    bits = {name: sum(dense["nats"][name]) / math.log(2) / dense["bytes"][name] for name in names}
    rows = [
        "| rows removed | of all parameters | chosen by | " + " | ".join(names) + " |",
        "| ---: | ---: | --- |" + " ---: |" * len(names),
        "| 0 | 0 % | dense | " + " | ".join(f"{bits[name]:.4f}" for name in names) + " |",
    ]
    for row in sorted(found["cells"], key=lambda row: row["removed"]):
        cells = [
            f"{values['bits_per_byte']:.4f} ({values['increase']:+.2%} ± {values['stderr']:.2%})"
            for values in (row["texts"][name] for name in names)
        ]
        rows.append(f"| {row['removed']} | {row['share']:.1%} | {row['method']} | " + " | ".join(cells) + " |")
    expected = "; ".join(
        f"{row['removed']} rows {row['expected']:+.2%} and {row['expected_new_text']:+.2%}"
        for row in found["cells"]
        if "expected" in row
    )
    return "\n".join(
        [
            "# Fewer tokens",
            "",
            f"`{found['command']}`",
            "",
            f"{settings['model']}, {settings['scenario']}; bits per byte of held-out text and, in brackets, the "
            f"increase over dense with its standard error over the windows. Up to {settings['tokens']} dense tokens of "
            f"each text are read and the second half of each window of {WINDOW} is scored, the same bytes for every "
            "vocabulary.",
            "",
            *rows,
            "",
            *_promised(found),
            f"![increase by rows removed]({name}.png)",
            "",
            *(f"- {name}: {what}." for name, what in METHODS.items()),
            "",
            f"Splits were measured on {note['sample_tokens']} tokens at {note['places']} places: "
            f"{note['mean_nats']:.2f} nats on the mean ({note['again']:.0%} of it where the token had been split "
            "in the same window before), of whose variance the regression explains "
            f"{note['explained']:.0%}. Increase that the prices expect, on the priced mixture of texts "
            f"({weights}) and on new text of the scenario: {expected}.",
            "",
        ]
    )


def _promised(found: dict[str, Any]) -> list[str]:
    """What was promised of the default model's vocabulary, and what came out at that size."""
    said = []
    if (found["settings"]["model"], found["settings"]["scenario"]) != PROMISED_OF:
        return []
    near = [
        row for row in found["cells"] if row["method"] == "expected loss" and abs(row["share"] - PROMISED_AT) < NEAR
    ]
    for row in sorted(near, key=lambda row: abs(float(row["share"]) - PROMISED_AT))[:1]:
        for name, limit in PROMISES.items():
            if name in row["texts"]:
                increase = row["texts"][name]["increase"]
                said.append(
                    f"- Promised where {PROMISED_AT:.0%} of all parameters go by expected loss: at most {limit:.1%} on "
                    f"the text *{name}*; it is {increase:+.2%}: {'met' if increase <= limit else 'not met'}."
                )
    return [*said, ""] if said else []


def draw(path: Path, found: dict[str, Any]) -> None:
    """Increase over dense with two standard errors by the share of all parameters removed, a panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found["dense"]["nats"])
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for method in METHODS:
            rows = sorted((row for row in found["cells"] if row["method"] == method), key=lambda row: row["removed"])
            figures = [row["texts"][name] for row in rows]
            axis.errorbar(
                [100 * row["share"] for row in rows], [100 * each["increase"] for each in figures],
                yerr=[200 * each["stderr"] for each in figures], marker="o", markersize=3.5, capsize=2, label=method,
            )  # fmt: skip
        axis.set_title(name)
        axis.set_xlabel("rows removed, % of all parameters")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("increase of bits per byte over dense, %")
    axes[0][-1].legend(frameon=False, fontsize=8)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def write_pages(out: Path, found: dict[str, Any]) -> None:
    """Writes ``out`` with the suffixes .csv, .md and .png."""
    for suffix, text in ((".csv", as_csv(found)), (".md", as_page(found, out.name))):
        with written_whole(out.with_suffix(suffix)) as part:
            part.write_text(text, encoding="utf-8")
    draw(out.with_suffix(".png"), found)
