"""What the page says in pairs of words: what was asked, what came out, how it was measured; many experts in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cusprun.benchmarks.report_page.frontier import MB
from cusprun.benchmarks.report_page.intervals import decode_ratio
from cusprun.benchmarks.report_page.plots import KINDS
from cusprun.benchmarks.report_page.reading import Measured
from cusprun.benchmarks.tables import MIB, Grid, increase_of
from cusprun.benchmarks.tally import percent
from cusprun.budget import Budget

Pairs = list[tuple[str, str]]
METHOD = {
    "name": "Method",
    "form": "Form of the refit",
    "widths": "Widths by",
    "combine": "Dimensions combined by",
    "ratio": "Share of parameters to remove",
    "epsilon": "Change of a layer's output allowed",
    "layout": "Layout",
    "align": "FFN widths are multiples of",
    "calibration_tokens": "Calibration tokens",
    "general_share": "Share of general text",
    "recover": "Training after the cut",
}


def asked(expert: Measured) -> Pairs:
    """The scenario, the dense model and the method, as far as they were given."""
    report = expert.report
    pairs = [(key.capitalize(), _show(value)) for key, value in report["scenario"].items() if key != "name" and value]
    if expert.card is not None:
        base = expert.card["base"]
        licence = f", {base['licence']}" if base.get("licence") else ""
        pairs.append(("Dense model", f"{base['id']} ({base['parameters'] / 1e6:.1f} M parameters{licence})"))
    method = report["method"]
    pairs += [(label, _show(method[key])) for key, label in METHOD.items() if method.get(key) is not None]
    if method.get("budget"):
        pairs.append(("What the device allows", Budget(**method["budget"]).words()))
    own = report["speed"]["expert"]
    return [*pairs, ("File type", f"{own['format']} {own['quant']}")]


def came_out(expert: Measured) -> Pairs:
    """Sizes, widths and files."""
    report = expert.report
    own, dense = report["speed"]["expert"], report["speed"]["dense"]
    pairs = [
        ("Parameters", _change(dense["parameters"], own["parameters"], " M", 1e6)),
        ("File", f"{_change(dense['file_bytes'], own['file_bytes'], ' MB', MB)}; {own['file_bytes'] / MIB:.1f} MiB"),
        ("Multiply-accumulates", _change(dense["macs_per_token"], own["macs_per_token"], " M per token", 1e6)),
    ]
    vocabulary = report["method"].get("vocabulary")
    if isinstance(vocabulary, dict) and all(isinstance(vocabulary.get(who), int) for who in ("dense", "expert")):
        pairs.append(("Vocabulary", _change(vocabulary["dense"], vocabulary["expert"], " tokens")))
    for kind, label in KINDS.items():
        before, after = (sum(layer[kind][when] for layer in report["layers"]) for when in ("before", "after"))
        if before:
            pairs.append((label, _change(before, after)))
    if report["method"].get("weights_note"):
        pairs.append(("Weights", str(report["method"]["weights_note"])))
    if expert.card is not None:
        for artifact in expert.card["artifacts"]:
            if artifact["quant"] == expert.quant:
                pairs.append((f"sha256 of {artifact['path']}", artifact["sha256"]))
    return pairs


def measured(expert: Measured) -> Pairs:
    """How each kind of figure was taken, on what and when."""
    report = expert.report
    machine = report["environment"]
    pairs = [("Speed and memory", report["speed"]["how"]), ("Held-out text", report["quality"]["how"])]
    if report["tasks"]["sets"]:
        pairs.append(("Multiple choice", report["tasks"]["how"]))
    if report.get("samples"):
        pairs.append(("Sample answers", report.get("samples_how", "")))
    load = machine.get("load_average")
    busy = f"; busy processes in the minute before the report: {load:.1f}" if isinstance(load, float) else ""
    cores = f"{machine['physical_cores']} cores, {machine['threads']} threads"
    pairs.append(("Machine", f"{machine['cpu']}, {cores}, {machine['system']}{busy}"))
    pairs.append(("Versions", ", ".join(f"{name} {number}" for name, number in machine["versions"].items())))
    return [*pairs, ("When", report["measured_at"])]


def summary(experts: Sequence[Measured]) -> Grid:
    """One row an expert, each beside its own dense model."""
    headers = (
        "expert",
        "scenario",
        "type",
        "MB",
        "of dense",
        "decode over dense",
        "over dense in bits/byte",
        "on",
        "p",
    )
    return Grid("Experts", headers, tuple(_summary_row(expert) for expert in experts))


def _summary_row(expert: Measured) -> tuple[str, ...]:
    report = expert.report
    own, speed = report["speed"]["expert"], report["speed"]
    ratio, interval = decode_ratio(speed)
    entry = report["quality"]["corpora"].get(expert.text, {})
    scenario = "-".join(str(value) for key, value in report["scenario"].items() if key != "name" and value)
    return (
        expert.name,
        scenario or "any",
        f"{own['format']} {own['quant']}",
        f"{own['file_bytes'] / MB:.1f}",
        f"{speed['ratios']['file_bytes']['exact']:.1%}",
        f"{ratio:.2f}×" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""),
        increase_of(entry) if entry.get("dense") else "",
        expert.text if entry.get("dense") else "",
        ", ".join(f"{found['paired']['p_value']:.2f}" for found in report["tasks"]["sets"].values()),
    )


def _change(before: float, after: float, unit: str = "", size: float = 1) -> str:
    """1,536 → 1,024 M (-33.3 %)."""
    form = ",.0f" if size == 1 else (",.1f" if after >= size else ",.3f")
    share = percent(after / before - 1) if before and after != before else "unchanged"
    return f"{before / size:{form}} → {after / size:{form}}{unit} ({share})"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
