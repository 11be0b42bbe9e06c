"""Figures as tables: on a terminal through rich, as plain text elsewhere, as Markdown in report.md.

ExecuTorch's layout: one row for each artifact, dense first, and a row of ratios under them. Readable at 80 columns.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cusprun.benchmarks.tally import REMARK, percent

if TYPE_CHECKING:
    from rich.table import Table

MIB = 2**20
SOLVED = "Solved for the device"


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn: headers (a line break where a narrow one breaks), rows of text, a note below."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def bench_table(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any] | None = None) -> Grid:
    """``rows`` as BenchRow.as_json() gives them, dense last; ``ratios`` of the first to the last adds a row."""
    headers = ("", "decode\ntok/s", "TTFT\nms", "prefill\ntok/s", "load\ns", "file\nMiB", "RSS\nMiB", "params\nM",
               "MACs\nM/tok")  # fmt: skip
    names = ("expert", "dense") if ratios is not None and len(rows) == 2 else tuple(map(artifact_name, rows))
    lines: list[tuple[str, ...]] = [
        (
            name,
            spread_text(row["decode_tps"]),
            f"{row['ttft_ms']:.0f}" if row["ttft_ms"] >= 100 else f"{row['ttft_ms']:.1f}",
            spread_text(row["prefill_tps"]),
            f"{row['load_s']:.2f}",
            _mib(row["file_bytes"]),
            _mib(row["peak_rss_bytes"]),
            _millions(row["parameters"]),
            _millions(row["macs_per_token"]),
        )
        for name, row in zip(names, rows, strict=True)
    ]
    lines.reverse()
    note = ""
    if rows:
        first = rows[0]
        note = (
            f"pp{first['prefill_tokens']} / tg{first['decode_tokens']}, mean ± sd of {first['decode_tps']['n']}, "
            f"{first['threads']} threads, {first['runtime']}, {first['quant']}; RSS: peak of the process"
        )
    if ratios is not None:
        keys = ("decode_tps", "ttft_ms", "prefill_tps", "load_s", "file_bytes", "peak_rss_bytes", "parameters",
                "macs_per_token")  # fmt: skip
        lines.append(("ratio", *(_times(_any_ratio(ratios[key])) for key in keys)))
        note += (
            f"; decode reaches {ratios['decode_yield']['median_of_pairs']:.0%} of the speed that the bytes promise, "
            f"prefill {ratios['prefill_yield']['median_of_pairs']:.0%} of what the MACs promise"
        )
    return Grid("Speed and size", headers, tuple(lines), note)


PERCENTILES = {"kld_p50": "median", "kld_p90": "90 %", "kld_p99": "99 %", "kld_max": "most"}


def quality_table(corpora: Mapping[str, Mapping[str, Any]]) -> Grid:
    """``corpora``: name -> {"expert": Quality, "dense": Quality, ...} as in report.json; dense may be missing."""
    headers = ("text", "", "bits/\nbyte", "over\ndense", "perplexity", "KL\nnats", "same\ntop-1", "tokens")
    lines: list[tuple[str, ...]] = []
    for name, entry in corpora.items():
        shown = {who: entry[who] for who in ("dense", "expert") if who in entry}
        for index, (who, quality) in enumerate(shown.items()):
            lines.append(
                (
                    "" if index else name,
                    who if len(shown) > 1 else "",
                    f"{quality['bits_per_byte']:.4f}",
                    increase_of(entry) if who == "expert" and "dense" in entry else "",
                    f"{quality['perplexity']:.2f} ± {quality['perplexity_stderr']:.2f}",
                    "" if quality["kld_mean"] is None else f"{quality['kld_mean']:.4f}",
                    "" if quality["top1_agreement"] is None else f"{quality['top1_agreement']:.1%}",
                    str(quality["tokens"]),
                )
            )
        if "ratios" in entry:
            ratios = entry["ratios"]
            comparable = ratios["perplexity"] is not None
            shown_ratio = _times(ratios["perplexity"]) if comparable else "not comparable"
            tokens = "" if comparable else _times(ratios["tokens"])
            lines.append(("", "ratio", _times(ratios["bits_per_byte"]), "", shown_ratio, "", "", tokens))
    context = next((entry["expert"]["context"] for entry in corpora.values()), 0)
    note = f"windows of {context} tokens; ± standard errors, of the increase paired by window; perplexity per token"
    if any(entry.get("dense") for entry in corpora.values()):
        note += "; KL and top-1 against dense" if not _different(corpora) else f"; {REMARK}"
    for name, entry in corpora.items():
        if spread := entry.get("divergence"):
            parts = ", ".join(f"{label} {spread[key]:.4f}" for key, label in PERCENTILES.items())
            note += f"; {name}: KL {parts}"
    return Grid("Quality on held-out text", headers, tuple(lines), note)


def tasks_table(sets: Mapping[str, Mapping[str, Any]]) -> Grid:
    """``sets``: name -> {"expert": McResult, "dense": McResult, "paired": ...} as in report.json."""
    headers = ("questions", "n", "answers", "dense [95 %]", "expert [95 %]", "p", "constant\nanswer", "chance")
    lines = []
    for name, entry in sets.items():
        expert, dense = entry["expert"], entry["dense"]
        for suffix, how in (("", "plain"), ("_normalised", "per byte")):
            lines.append(
                (
                    name if not suffix else "",
                    str(expert["n"]) if not suffix else "",
                    how,
                    _accuracy(dense, suffix),
                    _accuracy(expert, suffix),
                    f"{entry['paired' + suffix]['p_value']:.2f}",
                    f"{expert['constant_answer_accuracy']:.1%}",
                    f"{expert['chance']:.1%}",
                )
            )
    return Grid("Answers", headers, tuple(lines), "p: McNemar's exact test, expert against dense")


def solved_table(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """``rows`` as :func:`cusprun.benchmarks.report.solved_section` gives them."""
    shown = {
        "file_bytes": ("file, MB", 1e6, 1),
        "peak_rss_bytes": ("memory, MB", 1e6, 1),
        "decode_tps": ("decode, tokens/s", 1, 1),
        "speedup": ("decode over dense", 1, 2),
    }
    lines = []
    for row in rows:
        label, unit, digits = shown[row["figure"]]
        cells = [
            "" if row[key] is None else f"{row[key] / unit:.{digits}f}" for key in ("wish", "predicted", "measured")
        ]
        lines.append((label, *cells, percent(row["error"])))
    return Grid(
        SOLVED, ("", "wished", "predicted", "measured", "error"), tuple(lines), "error: predicted over measured"
    )


def report_tables(report: Mapping[str, Any]) -> list[Grid]:
    """The tables of a whole report; a section that was not measured has none."""
    speed = report["speed"]
    corpora = report["quality"]["corpora"]
    first = bench_table([speed["expert"], speed["dense"]], speed["ratios"])
    for name in _different(corpora)[:1]:
        more = corpora[name]["ratios"]["tokens"]
        first = replace(first, note=f"{first.note}; each counts its own tokens: {name} takes the expert {more:.3f}× "
                        "as many as dense")  # fmt: skip
    grids = [first]
    if report.get("solved"):
        grids.append(solved_table(report["solved"]))
    if corpora:
        grids.append(quality_table(corpora))
    if report["tasks"]["sets"]:
        grids.append(tasks_table(report["tasks"]["sets"]))
    return grids


def render_table(report: Mapping[str, Any]) -> str:
    """All tables of a report as plain text."""
    return "\n".join(as_text(grid) for grid in report_tables(report))


def as_rich(grid: Grid) -> Table:
    """For a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=grid.title,
        caption=grid.note or None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for index, header in enumerate(grid.headers):
        table.add_column(header, justify="left" if index == 0 or not header else "right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row, style="bold" if "ratio" in row[:2] else None)
    return table


def as_text(grid: Grid, width: int = 100) -> str:
    """The same without colours, for a file or a pipe."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, emoji=False, markup=False)
    console.print(as_rich(grid))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def print_tables(grids: Sequence[Grid]) -> None:
    """To stdout, drawn for what stdout is."""
    import sys

    from rich.console import Console

    if sys.stdout.isatty():
        console = Console()
        for grid in grids:
            console.print(as_rich(grid))
    else:
        for grid in grids:
            print(as_text(grid))


def as_markdown(grid: Grid) -> str:
    """A GitHub table under a heading."""
    lines = [f"## {grid.title}", ""]
    lines.append("| " + " | ".join(header.replace("\n", " ") for header in grid.headers) + " |")
    lines.append("|" + "|".join(":--" if index == 0 else "--:" for index in range(len(grid.headers))) + "|")
    lines.extend("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in grid.rows)
    return "\n".join([*lines, "", grid.note, ""])


def render_markdown(report: Mapping[str, Any]) -> str:
    """report.md: the tables, how they were measured, widths, text used, proofs, stages."""
    machine = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts = [
        "# Report",
        "",
        f"Scenario: {_pairs(report['scenario'])}. Method: {_pairs(report['method'])}.",
        f"Measured {report['measured_at']} on {machine['cpu']} ({machine['physical_cores']} cores), "
        f"{machine['threads']} threads, {machine['system']}; {versions}.",
        "",
        *_headline(report["quality"]["corpora"]),
        *map(as_markdown, report_tables(report)),
        "How speed was measured: " + report["speed"]["how"] + ".",
        "",
        "How quality was measured: " + report["quality"]["how"] + ".",
        "",
        "How answers were scored: " + report["tasks"]["how"] + ".",
        "",
    ]
    parts.extend(map(as_markdown, record_grids(report)))
    return "\n".join(parts).rstrip() + "\n"


def record_grids(report: Mapping[str, Any]) -> list[Grid]:
    """Widths, text, proofs and stages of a report, as far as there are any."""
    grids = []
    for title, rows in (
        ("Widths", [_widths(layer) for layer in report["layers"]]),
        ("Text", report["corpora"]),
        ("Files proved against torch", report["proofs"]),
        ("Stages", [{"stage": name, "seconds": f"{seconds:.1f}"} for name, seconds in report["stages"].items()]),
    ):
        if rows:
            headers = tuple(dict.fromkeys(key for row in rows for key in row))
            cells = tuple(tuple(_cell(row.get(header)) for header in headers) for row in rows)
            grids.append(Grid(title, headers, cells, _gone(report["layers"]) if title == "Widths" else ""))
    return grids


def _headline(corpora: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the expert's text costs more than dense's, in bits per byte, as one sentence."""
    found = [f"{name} {increase_of(e)}" for name, e in corpora.items() if "dense" in e]
    return [f"Bits per byte of held-out text, expert over dense: **{', '.join(found)}**.", ""] if found else []


def increase_of(entry: Mapping[str, Any]) -> str:
    """How much more bits per byte one text of report.json takes than with dense, with its standard error."""
    return percent(entry["bits_per_byte_increase"], entry.get("bits_per_byte_increase_stderr"))


def _different(corpora: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Texts that expert and dense read in different vocabularies."""
    return [name for name, entry in corpora.items() if not entry.get("same_vocabulary", True)]


def artifact_name(row: Mapping[str, Any]) -> str:
    """An artifact's name as a table has room for it."""
    name = str(row["artifact"]).rstrip("/").rsplit("/", 1)[-1]
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"


def _gone(layers: Sequence[Mapping[str, Any]]) -> str:
    """Says which layers went whole or lost their attention."""
    whole = [str(layer["layer"]) for layer in layers if layer["ffn"]["after"] == layer["heads"]["after"] == 0]
    silent = [str(layer["layer"]) for layer in layers if layer["ffn"]["after"] > 0 == layer["heads"]["after"]]
    found = [f"layers gone: {', '.join(whole)}"] * bool(whole)
    return "; ".join([*found, *[f"layers without attention: {', '.join(silent)}"] * bool(silent)])


def _widths(layer: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {kind: f"{layer[kind]['before']} → {layer[kind]['after']}" for kind in ("ffn", "heads", "kv_heads")}
    return {"layer": layer["layer"], **kinds}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None) or "any"


def spread_text(spread: Mapping[str, float]) -> str:
    """Mean ± sd, without decimals from a thousand on."""
    return f"{spread['mean']:.1f} ± {spread['sd']:.1f}" if spread["mean"] < 1000 else (
        f"{spread['mean']:.0f} ± {spread['sd']:.0f}"
    )  # fmt: skip


def _mib(value: float) -> str:
    return f"{value / MIB:.1f}" if value >= MIB else f"{value / MIB:.3f}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f}" if value >= 1e6 else f"{value / 1e6:.3f}"


def _times(ratio: float) -> str:
    return f"{ratio:.3f}×"


def _any_ratio(ratio: Mapping[str, float]) -> float:
    return ratio["exact"] if "exact" in ratio else ratio["median_of_pairs"]


def _accuracy(result: Mapping[str, Any], suffix: str) -> str:
    low, high = result["interval" + suffix]
    return f"{result['accuracy' + suffix]:.1%} [{low:.0%}, {high:.0%}]"
