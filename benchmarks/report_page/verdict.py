"""The verdict in three sentences: what was bought, what it costs, whether to ship it; from the figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cusprun.benchmarks.dominance import MEMORY_TOLERANCE
from cusprun.benchmarks.report_page.frontier import MB, Frontier, Row
from cusprun.benchmarks.report_page.intervals import decode_ratio
from cusprun.benchmarks.tables import increase_of

SIGNIFICANT = 0.05


def verdict(report: Mapping[str, Any], frontier: Frontier | None, row: Row | None) -> tuple[str, str, str]:
    """Three sentences; ``row`` is the expert's own in ``frontier``."""
    return bought(report["speed"]), paid(report), shipping(report, frontier, row)


def bought(speed: Mapping[str, Any]) -> str:
    """Bytes and decoding speed, with the interval of the paired runs."""
    expert, dense = speed["expert"], speed["dense"]
    share = speed["ratios"]["file_bytes"]["exact"] - 1
    size = f"{abs(share):.1%} {'smaller' if share < 0 else 'larger'} than" if share else "as large as"
    file = (
        f"The expert's file has {expert['file_bytes'] / MB:.1f} MB, {size} the dense model's in {dense['quant']} "
        f"({dense['file_bytes'] / MB:.1f} MB)"
    )
    means = f"{expert['decode_tps']['mean']:.1f} tokens/s against {dense['decode_tps']['mean']:.1f}"
    value, interval = decode_ratio(speed)
    ratio = f"{value:.2f}×"
    if interval is None:
        n = expert["decode_tps"]["n"]
        return f"{file}, and it decodes {means} ({ratio}, of {n} runs each: too few for an interval)."
    shown = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}, {expert['decode_tps']['n']} paired runs"
    if interval[0] <= 1 <= interval[1]:
        return f"{file}; a difference in decoding speed is not shown: {means} ({ratio}, {shown})."
    return f"{file}, and it decodes {'faster' if interval[0] > 1 else 'slower'}: {means} ({ratio}, {shown})."


def paid(report: Mapping[str, Any]) -> str:
    """Bits per byte on every text, and multiple choice with what chance and a constant answer would give."""
    corpora = {name: entry for name, entry in report["quality"]["corpora"].items() if entry.get("dense")}
    if corpora:
        each = [f"{increase_of(entry)} on {name}" for name, entry in corpora.items()]
        text = f"Bits per byte of held-out text change by {_listed(each)}"
    else:
        text = "What it costs on held-out text was not measured"
    sets = report["tasks"]["sets"]
    return f"{text}; " + ("; ".join(_answers(sets[name]) for name in sets) if sets else "no questions were asked") + "."


def shipping(report: Mapping[str, Any], frontier: Frontier | None, row: Row | None) -> str:
    """Beside the other files of the frontier, or that nobody compared."""
    if frontier is None:
        quant = report["speed"]["dense"]["quant"]
        return (
            f"Whether to ship it is open: it was held against the dense model in {quant} alone and not in harder "
            "quantization, in which it may be smaller and lose less; `cusprun-edge compare` measures that."
        )
    others = len(frontier.rows) - 1
    if row is None or others < 1:
        return "Whether to ship it is open: the comparison does not hold this file; `cusprun-edge compare` measures it."
    timed = row.tps is not None and all(other.tps is not None for other in frontier.rows)
    weighed = row.rss is not None and all(other.rss is not None for other in frontier.rows)
    figures = f"as small, {'as fast ' if timed else ''}and as good on {frontier.text}"
    if frontier.dominated(row):
        better = frontier.dominating(row)
        if not better:
            return f"On these figures do not ship it: {row.remark or 'it is dominated'}."
        several = len(better) > 1
        memory = f", and take{'' if several else 's'} as little memory" if weighed else ""
        named = _listed([_figures(other, frontier.text) for other in better])
        return (
            f"On these figures do not ship it: {named} {'are each' if several else 'is'} at least "
            f"{figures}{memory}{_alike(row, better)}."
        )
    held = [other for other in frontier.dominating(row, memory=False) if (other.rss or 0) > (row.rss or math.inf)]
    aside = [
        other for other in frontier.rows
        if other is not row and other not in held and other.bytes < row.bytes
        and _bits(other, frontier) < _bits(row, frontier)
    ]  # fmt: skip
    files = "the one other file" if others == 1 else f"any of the {others} other files"
    sentence = f"It is not dominated by {files} compared: "
    if held:
        sentence += f"only its memory ({_memory(row, held)}) keeps it from being dominated by "
        sentence += _listed([_figures(other, frontier.text) for other in held])
    else:
        sentence += f"none is at once {figures}{' and takes as little memory' if weighed else ''}"
    if aside:
        named = _listed([_figures(other, frontier.text) for other in aside])
        sentence += (
            f", though {named} {'are' if len(aside) > 1 else 'is'} smaller and lose{'' if len(aside) > 1 else 's'} less"
        )
    if not any(other.kind == "dense" and other.bytes < row.bytes for other in frontier.rows):
        sentence += "; no dense file as small as it was among them (`cusprun-edge compare` measures such)"
    return sentence + "."


def _answers(entry: Mapping[str, Any]) -> str:
    expert, dense, paired = entry["expert"], entry["dense"], entry["paired"]
    constant = expert["constant_answer_accuracy"]
    if expert["accuracy"] == dense["accuracy"]:
        chance = "no difference"
    elif paired["p_value"] >= SIGNIFICANT:
        chance = "a difference within chance"
    else:
        chance = "a difference beyond chance"
    right = (
        f"of {expert['n']} questions it answers {_scored(expert)} right and dense {_scored(dense)}, {chance} "
        f"(p {_p(paired['p_value'])}; scored per byte p {_p(entry['paired_normalised']['p_value'])})"
    )
    bounds = {who: entry[who]["interval"] for who in ("dense", "expert")}
    within = [who for who, (low, high) in bounds.items() if low <= constant]
    if len(within) == 2:
        return f"{right}, and neither is shown to beat a constant answer's {constant:.1%}"
    if within:
        return f"{right}, and {within[0]} is not shown to beat a constant answer's {constant:.1%}"
    return f"{right}; a constant answer gets {constant:.1%}"


def _scored(result: Mapping[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['accuracy']:.1%} [{low:.0%}, {high:.0%}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.{2 if value >= 0.01 else 3}f}"


def _figures(row: Row, text: str) -> str:
    speed = f", {row.tps['mean']:.0f} tokens/s" if row.tps is not None else ""
    return f"{row.name} in {row.type} ({row.bytes / MB:.1f} MB, {row.bits[text]:.3f} bits per byte{speed})"


def _memory(row: Row, others: Sequence[Row]) -> str:
    """200 MB against 240 MB."""
    sizes = [one.rss / MB for one in (row, *others) if one.rss is not None]
    own, *theirs = [f"{size:.{0 if min(sizes) >= 100 else 1}f} MB" for size in sizes]
    return f"{own} against {_listed(theirs)}"


def _alike(row: Row, others: Sequence[Row]) -> str:
    """What is called as good though its figure is worse."""
    slower = [other for other in others if row.tps and other.tps and other.tps["mean"] < row.tps["mean"]]
    larger = [other for other in others if (other.rss or 0) > (row.rss or math.inf)]
    said = ["the rounds show no difference in speed"] * bool(slower)
    said += [f"memory is alike within {MEMORY_TOLERANCE:.0%}"] * bool(larger)
    return f" ({'; '.join(said)})" if said else ""


def _bits(row: Row, frontier: Frontier) -> float:
    return row.bits.get(frontier.text, float("inf"))


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
