"""Bench rows as llama-bench writes its results: one line per test under its own names, ours after them.

Columns and their meaning: https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cusprun.files import written_whole

THEIRS = ("cpu_info", "backends", "model_filename", "model_type", "model_size", "model_n_params", "n_threads",
          "type_k", "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
          "stddev_ts")  # fmt: skip
OURS = ("test", "runs", "median_ts", "ci95_low_ts", "ci95_high_ts", "ttft_ms", "bandwidth_bytes_per_s",
        "bandwidth_share", "joules_per_token", "test_peak_rss_bytes", "runtime", "format", "file_bytes", "load_s",
        "load_cold_s", "kv_bytes_per_token", "macs_per_token")  # fmt: skip


def lines(rows: Sequence[Mapping[str, Any]], cpu: str) -> list[dict[str, Any]]:
    """One line for each test of each row (BenchRow.as_json()); what was not measured is empty."""
    return [_line(row, test, cpu) for row in rows for test in row["tests"]]


def _line(row: Mapping[str, Any], test: Mapping[str, Any], cpu: str) -> dict[str, Any]:
    low, high = test["tps"]["ci95"] or (None, None)
    return {
        "cpu_info": cpu,
        "backends": {"cpu": "CPU", "cuda": "CUDA"}[row["device"]],
        "model_filename": row["artifact"],
        "model_type": f"{row['architecture']} {_count(row['parameters'])} {row['quant'].upper()}",
        "model_size": row["tensor_bytes"],
        "model_n_params": row["parameters"],
        "n_threads": row["threads"],
        "type_k": row["kv_type"],
        "type_v": row["kv_type"],
        **{key: test[key] for key in ("n_prompt", "n_gen", "n_depth")},
        "test_time": row["measured_at"],
        "avg_ns": round(test["avg_ns"]),
        "stddev_ns": round(test["stddev_ns"]),
        "avg_ts": test["tps"]["mean"],
        "stddev_ts": test["tps"]["sd"],
        "test": test["test"],
        "runs": test["tps"]["n"],
        "median_ts": test["tps"]["median"],
        "ci95_low_ts": low,
        "ci95_high_ts": high,
        **{key: test[key] for key in ("ttft_ms", "bandwidth_bytes_per_s", "bandwidth_share", "joules_per_token")},
        "test_peak_rss_bytes": test["peak_rss_bytes"],
        **{key: row[key] for key in OURS[10:]},
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], cpu: str) -> None:
    """One line per test, whole or not at all."""
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*THEIRS, *OURS))
        writer.writeheader()
        writer.writerows(lines(rows, cpu))


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """llama-bench's Markdown table, with the interval of the mean behind it."""
    found = ["| model | size | params | backend | threads | test | t/s | 95 % of the mean | n |"]
    found.append("| --- | --: | --: | --- | --: | --- | --: | --: | --: |")
    for row in rows:
        for test in row["tests"]:
            tps = test["tps"]
            interval = f"{tps['ci95'][0]:.2f} – {tps['ci95'][1]:.2f}" if tps["ci95"] else ""
            cells = [
                f"{Path(row['artifact']).name} {row['quant'].upper()}", f"{row['tensor_bytes'] / 2**20:.2f} MiB",
                _count(row["parameters"]), {"cpu": "CPU", "cuda": "CUDA"}[row["device"]], str(row["threads"]),
                test["test"], f"{tps['mean']:.2f} ± {tps['sd']:.2f}", interval, str(tps["n"]),
            ]  # fmt: skip
            found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
