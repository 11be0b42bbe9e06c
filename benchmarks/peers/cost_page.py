"""What the study of importance's cost leaves to read: a table of the units, a picture and a page."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from cusprun.files import written_whole

MEASURES = ("block_change", "layer_change", "loss_change")
PROMISES = {"importance": 1.3, "refit statistics": 2.5}  # times one plain forward pass


def oracle_cell(settings: dict[str, Any], layer: int) -> str:
    """The name of the cell that holds one layer's sampled units."""
    return f"oracle, layer {layer}, {settings['units']} units, {settings['oracle_tokens']} tokens"


def write_csv(path: Path, found: dict[str, Any]) -> None:
    """One row a unit."""
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["layer", "kind", "index", "closed_form", *MEASURES])
        for layer in found["settings"]["layers"]:
            for unit in found["cells"][oracle_cell(found["settings"], layer)]["units"]:
                rows.writerow([layer, *(unit[key] for key in ("kind", "index", "closed_form", *MEASURES))])


def draw(path: Path, found: dict[str, Any]) -> None:
    """Closed form against the oracle's output change and loss change, a colour a layer, kv groups as squares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, measure, label in zip(
        axes, ("block_change", "loss_change"),
        ("relative output change, ablated", "loss change, ablated (nats per token)"), strict=True,
    ):  # fmt: skip
        for number, layer in enumerate(found["settings"]["layers"]):
            for kind, marker in (("ffn", "o"), ("attention", "s")):
                units = [
                    unit
                    for unit in found["cells"][oracle_cell(found["settings"], layer)]["units"]
                    if unit["kind"] == kind
                ]
                axis.scatter(
                    [unit["closed_form"] for unit in units], [unit[measure] for unit in units],
                    marker=marker, color=f"C{number}", s=18, label=f"layer {layer}" if kind == "ffn" else None,
                )  # fmt: skip
        axis.set(xscale="log", xlabel="closed form (Cus-Prun)", ylabel=label)
        axis.set_yscale("log") if measure == "block_change" else axis.set_yscale("symlog", linthresh=1e-5)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=130)
    pyplot.close(figure)


def page(found: dict[str, Any], name: str) -> str:
    """The page under docs/results."""
    settings, result = found["settings"], found["result"]
    costs = [f"| one plain forward pass | {result['forward_cpu_s']:.1f} | 1 | |"]
    for kind, limit in PROMISES.items():
        ratio = result["ratios"][kind]
        spread = f"{min(ratio['rounds']):.2f} … {max(ratio['rounds']):.2f}"
        seconds = ratio["median"] * result["forward_cpu_s"]
        costs.append(f"| {kind} | {seconds:.1f} | {ratio['median']:.2f} ({spread}) | ≤ {limit} |")
    factors = result["oracle_factor"]
    ranks = [
        f"| {layer} | " + " | ".join(f"{rank:.3f}" for rank in found.values()) + " |"
        for layer, found in result["spearman"].items()
    ]
    heads = [
        f"{of}, {what}" for of in ("all units", "channels") for what in ("block's output", "layer's output", "loss")
    ]
    lines = [
        "# What importance costs, and how it ranks beside the oracle",
        "",
        f"`python -m cusprun.benchmarks.peers.cost --rounds {settings['rounds']} "
        f"--oracle-tokens {settings['oracle_tokens']} --units {settings['units']}`",
        "",
        f"SmolLM2-135M-Instruct, {settings['tokens']} calibration tokens of {settings['scenario']} in windows of "
        f"{settings['window']}, {settings['threads']} thread of {found['environment']['cpu']}, CPU seconds, "
        f"medians of {settings['rounds']} rounds in turn. The plain pass has its weights in memory and leaves the "
        "output head out; the others read the weights from disk layer by layer.",
        "",
        "| pass | CPU seconds | × forward (range) | promise |",
        "| --- | --- | --- | --- |",
        *costs,
        "",
        f"The leave-one-out oracle for all {result['units_of_the_model']} units over the same tokens would take "
        f"{factors['output']:,.0f} times as long as the importance of all of them for output changes and "
        f"{factors['loss']:,.0f} times for losses (from {settings['units']} units in each of layers "
        f"{', '.join(map(str, settings['layers']))} on {settings['oracle_tokens']} tokens).",
        "",
        "Spearman's rank correlation of the closed form with the oracle. Its own definition is the change of what the "
        "block that holds the unit gives, over the norm of the layer's output; for channels that is the layer's.",
        "",
        "| layer | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * len(heads),
        *ranks,
        "",
        f"![closed form against the oracle]({name}.png)",
    ]
    return "\n".join(lines) + "\n"
