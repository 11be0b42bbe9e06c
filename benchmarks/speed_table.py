"""The tables of `bench`: the headline for each number of threads, every test, loads and memory; and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cusprun.benchmarks import llama_bench
from cusprun.benchmarks.tables import MIB, Grid, artifact_name, as_markdown, bench_table, spread_text
from cusprun.files import written_whole


def bench_tables(found: Mapping[str, Any]) -> list[Grid]:
    """Of the document that `bench --json` prints: for each number of threads the headline and the tests; the loads."""
    grids = []
    for count in dict.fromkeys(row["threads"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["threads"] == count]
        compared = {one["artifact"]: one["ratios"] for one in found["comparisons"] if one["threads"] == count}
        grids.append(bench_table(rows, next(iter(compared.values())) if len(compared) == 1 else None))
        grids.append(_tests(rows, compared))
    return [*grids, _loads(found["rows"], found["environment"])]


def _tests(rows: Sequence[Mapping[str, Any]], compared: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Every test of rows with the same threads: mean, its interval, and the ratio to the same test of another."""
    first = rows[0]
    energy = any(test["joules_per_token"] is not None for row in rows for test in row["tests"])
    headers = ("", "test", "tok/s", "95 % of\nthe mean", "GB/s", "of\ncopy", *["J/\ntoken"] * energy,
               *["ratio [95 %]"] * bool(compared))  # fmt: skip
    lines = []
    for row in rows:
        ratios = compared[row["artifact"]]["tests"] if row["artifact"] in compared else {}
        for index, test in enumerate(row["tests"]):
            read, share, joules = (
                test[key] for key in ("bandwidth_bytes_per_s", "bandwidth_share", "joules_per_token")
            )
            lines.append(
                (
                    "" if index else artifact_name(row),
                    test["test"],
                    spread_text(test["tps"]),
                    _rates(test["tps"]["ci95"]),
                    "" if read is None else f"{read / 1e9:.1f}",
                    "" if share is None else f"{share:.0%}",
                    *(["" if joules is None else f"{joules:.3g}"] * energy),
                    *([_interval(ratios.get(test["test"]))] * bool(compared)),
                )
            )
    title = f"Tests, {first['threads']} thread{'s' if first['threads'] > 1 else ''}, {first['rounds']} round"
    title += "s" * (first["rounds"] > 1)
    notes = ["mean ± sd; GB/s: weights and cache that are read for each token"]
    if first["copy_bytes_per_s"]:
        notes.append(f"the machine copies {first['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    if compared:
        notes.append("ratio: geometric mean within the rounds")
    notes += [*dict.fromkeys(note for row in rows for note in row["notes"]), first["stopped"]]
    return Grid(title, headers, tuple(lines), "; ".join(notes))


def _loads(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> Grid:
    """Loads from page cache and disk, what a token costs in memory, and the machine."""
    device = any(row["device_bytes"] is not None for row in rows)
    headers = ("", "threads", "load s\nwarm", "load s\ncold", "1st token\ns, warm", "1st token\ns, cold",
               "weights\nMiB/token", "cache\nB/token", "cache\ntype", *["device\nMiB"] * device)  # fmt: skip
    lines = [
        (
            artifact_name(row),
            str(row["threads"]),
            *(_seconds(row[key]) for key in ("load_s", "load_cold_s", "ready_s", "ready_cold_s")),
            f"{row['weight_bytes'] / MIB:.1f}",
            str(row["kv_bytes_per_token"]),
            str(row["kv_type"]),
            *(["" if row["device_bytes"] is None else f"{row['device_bytes'] / MIB:.1f}"] * device),
        )
        for row in rows
    ]
    note = "medians; cold: the files dropped from the page cache before; 1st token: load included\n" + _machine(where)
    return Grid("Loading and memory", headers, tuple(lines), note)


def write_page(path: Path, found: Mapping[str, Any], command: str) -> None:
    """The tables as Markdown, llama-bench's first, with the machine and the command; whole or not at all."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        "# Bench", "", f"`{command}`", "",
        f"{machine['cpu']}, {machine['physical_cores']} cores, {' '.join(machine['instruction_sets'])}; "
        f"{machine['system']}; {versions}. {found['rows'][0]['stopped'].capitalize()}.", "",
        *llama_bench.markdown(found["rows"]), "",
        *map(as_markdown, bench_tables(found)),
    ]  # fmt: skip
    with written_whole(path) as part:
        part.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _interval(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    if ratio["ci95"] is None:
        return f"{ratio['of_pairs']:.3f}×"
    low, high = (f"{bound:.3f}" if bound < 100 else "over 100" for bound in ratio["ci95"])
    return f"{ratio['of_pairs']:.3f}× [{low}, {high}]"


def _rates(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    digits = 1 if interval[1] < 1000 else 0
    return f"{interval[0]:.{digits}f} – {interval[1]:.{digits}f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _machine(where: Mapping[str, Any]) -> str:
    """Processor, what it computes with, and what ran on it."""
    sets = " ".join(where["instruction_sets"])
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['cpu']}, {where['physical_cores']} cores; {sets}\n{where['system']}; {versions}"
