"""Answers to questions and scores on the harness's tasks as tables, from the same JSON that `eval --json` prints.

A row for each kind of items or each task with its number of items, below it a row for each score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cusprun.benchmarks.tables import Grid

HEADERS = ("", "score\n[95 %]", "against\n[95 %]", "difference\n[95 %]", "p", "no\nmodel", "chance")
COMPARED = slice(2, 5)  # the columns that need a second artifact


def questions_table(kinds: Mapping[str, Mapping[str, Any]]) -> Grid:
    """``kinds``: name -> KindResult.as_json(); scores in percent."""
    notes = [f"{kind}: {entry['constant_answer']}" for kind, entry in kinds.items()]
    return _grid("Answers, %", kinds, f"no model: the constant answer, of {', '.join(notes)}", _percent)


def harness_table(tasks: Mapping[str, Mapping[str, Any]]) -> Grid:
    """``tasks``: name -> TaskResult.as_json(); scores as the harness has them."""
    note = "no model: the position that is right most often"
    return _grid("Tasks of lm-evaluation-harness", tasks, note, _plain)


def _percent(value: float, sign: str, bound: bool) -> str:
    return f"{100 * value:{sign}.{0 if bound else 1}f}"


def _plain(value: float, sign: str, bound: bool) -> str:
    return f"{value:{sign}.{2 if bound else 3}f}".replace("0.", ".", 1 if abs(value) < 1 else 0)


def _p_value(value: float | None) -> str:
    return "" if value is None else "<.001" if value < 0.0005 else f"{value:.3f}"


def _grid(
    title: str, groups: Mapping[str, Mapping[str, Any]], note: str, number: Callable[[float, str, bool], str]
) -> Grid:
    def figure(value: Mapping[str, Any] | None, sign: str = "") -> str:
        if value is None:
            return ""
        bounds = "" if value["interval"] is None else ", ".join(number(end, sign, True) for end in value["interval"])
        return number(value["value"], sign, False) + (f" [{bounds}]" if bounds else "")

    def share(value: float | None) -> str:
        return "" if value is None else number(value, "", False)

    rows: list[list[str]] = []
    tests = set()
    for name, entry in groups.items():
        rows.append([f"{name}, {entry['n']}", *[""] * (len(HEADERS) - 1)])
        for metric, values in entry["metrics"].items():
            gap = values["difference"]
            tests |= set() if gap is None else {gap["test"]}
            p_value = "" if gap is None else _p_value(gap["p_value"])
            cells = [figure(values["artifact"]), figure(values["against"]), figure(gap, "+"), p_value]
            shown = metric.replace("_normalised", "/byte")
            rows.append([f"  {shown}", *cells, share(values["constant"]), share(values["chance"])])
    headers = list(HEADERS)
    if tests:
        note += f"; p: {', '.join(sorted(tests))}"
    elif not any(row[COMPARED.start] for row in rows):
        for line in (headers, *rows):
            del line[COMPARED]
    return Grid(title, tuple(headers), tuple(map(tuple, rows)), note)
