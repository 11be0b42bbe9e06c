"""The page as HTML: what the template shows of every expert, and the template filled in, all text escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from cusprun.benchmarks.report_page.facts import asked, came_out, measured, summary
from cusprun.benchmarks.report_page.frontier import (
    Frontier,
    Row,
    find_row,
    frontier_plots,
    frontier_table,
    given_frontier,
    own_frontiers,
)
from cusprun.benchmarks.report_page.plots import Plot, plots
from cusprun.benchmarks.report_page.reading import Measured
from cusprun.benchmarks.report_page.verdict import verdict
from cusprun.benchmarks.tables import Grid, record_grids, report_tables

LONG = 24  # characters of a cell that may break
HERE = Path(__file__).parent
FIGURE = re.compile(r"[+−-]?\d[\d.,]*( ?[%×]| ± [\d.,]+| \[.*\]| → [\d.,]+| to [\d.,]+( %)?)*")


@dataclass(frozen=True)
class Compared:
    """A frontier as the page shows it."""

    frontier: Frontier
    plots: list[Plot]
    table: Grid


@dataclass(frozen=True)
class Shown:
    """One expert as the page shows it; ``key`` begins its ids."""

    key: str
    expert: Measured
    verdict: tuple[str, str, str]
    asked: list[tuple[str, str]]
    came_out: list[tuple[str, str]]
    plots: Mapping[str, Plot]
    compared: Compared | None
    tables: Mapping[str, Grid]
    records: Mapping[str, Grid]
    measured: list[tuple[str, str]]

    @property
    def samples(self) -> Sequence[Mapping[str, Any]]:
        """Prompts with both answers."""
        found: Sequence[Mapping[str, Any]] = self.expert.report.get("samples", ())
        return found

    @property
    def language(self) -> str | None:
        """Of the samples, where the scenario names one."""
        found = self.expert.report["scenario"].get("language")
        return found if isinstance(found, str) and re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*", found) else None


def render_page(experts: Sequence[Measured], links: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page. The same reports give the same text, byte for byte; ``links`` (label, address) stand on top."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "code": _code, "filled": _filled, "named": _named_rows, "classes": _classes, "sentence": _sentence
    }  # fmt: skip
    own = own_frontiers(experts)
    places: dict[int, tuple[Frontier, Row]] = {
        index: (frontier, row) for frontier, rows in own for index, row in rows.items()
    }
    shown = [_shown(expert, index, places.get(index)) for index, expert in enumerate(experts)]
    compared = [_compared(frontier, f"all-{number}") for number, (frontier, _) in enumerate(own)]
    return environment.get_template("page.html.j2").render(
        title=shown[0].expert.name if len(shown) == 1 else f"{len(shown)} experts",
        experts=shown,
        compared=compared,
        summary=summary(experts) if len(shown) > 1 else None,
        links=links,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )


def verdicts(experts: Sequence[Measured]) -> list[tuple[str, str, str]]:
    """Three sentences for each expert, as the page has them."""
    places = {index: (frontier, row) for frontier, rows in own_frontiers(experts) for index, row in rows.items()}
    return [_verdict(expert, places.get(index)) for index, expert in enumerate(experts)]


def _verdict(expert: Measured, place: tuple[Frontier, Row] | None) -> tuple[str, str, str]:
    given = given_frontier(expert.report)
    if given is not None:
        return verdict(expert.report, given, find_row(given, expert))
    return verdict(expert.report, *(place or (None, None)))


def _shown(expert: Measured, index: int, place: tuple[Frontier, Row] | None) -> Shown:
    key, report = f"e{index}", expert.report
    given = given_frontier(report)
    tables = {grid.title: grid for grid in report_tables(report)}
    return Shown(
        key=key,
        expert=expert,
        verdict=_verdict(expert, place),
        asked=asked(expert),
        came_out=came_out(expert),
        plots=plots(report, key),
        compared=_compared(given, f"{key}-frontier") if given is not None else None,
        tables=tables,
        records={grid.title: grid for grid in record_grids(report) if grid.title != "Widths"},
        measured=measured(expert),
    )


def _compared(frontier: Frontier, prefix: str) -> Compared:
    return Compared(frontier, frontier_plots(frontier, prefix), frontier_table(frontier))


def _code(text: str) -> Markup:
    """Escaped, what stands between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _filled(grid: Grid) -> Grid:
    """Without the columns that no row has anything in."""
    kept = [column for column in range(len(grid.headers)) if any(row[column] for row in grid.rows)]
    rows = tuple(tuple(row[column] for column in kept) for row in grid.rows)
    return replace(grid, headers=tuple(grid.headers[column] for column in kept), rows=rows)


def _classes(grid: Grid) -> list[str]:
    """Of each column: n, numbers, which stand to the right; w, long text, which wraps; or nothing."""
    found = []
    for column in range(len(grid.headers)):
        cells = [row[column] for row in grid.rows if row[column]]
        figures = sum(FIGURE.fullmatch(cell) is not None for cell in cells)
        number = column > 0 and 2 * figures > len(cells)
        found.append("n" if number else "w" if max(map(len, cells), default=0) > LONG else "")
    return found


def _named_rows(grid: Grid) -> list[tuple[str, bool, tuple[str, ...]]]:
    """Of each row its name, whether that is only repeated for who cannot see the one above, and the other cells."""
    found, name = [], ""
    for first, *rest in grid.rows:
        name = first or name
        found.append((name, not first, tuple(rest)))
    return found
