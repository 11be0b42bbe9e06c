"""What a study leaves: JSON with everything, CSV with a row a cell, a picture, and a page with tables and sentences."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.benchmarks.environment import environment
from cusprun.benchmarks.tally import percent
from cusprun.files import write_json, written_whole

if TYPE_CHECKING:
    from cusprun.benchmarks.peers.grid import Cell
    from cusprun.benchmarks.peers.study import Telling

TEXTS = ("scenario", "domain", "general")  # in this order where a scene has them, others after
ASIDE = "set aside"  # calibration-side text that gave no statistics
NAMED = 6  # cells that the page names as not run; the JSON names all
COLUMNS = {
    "scenario": "held-out text of the scenario",
    "domain": "other text of its domain, from a source never calibrated on",
    "general": "general text, from a source never calibrated on",
    ASIDE: "calibration-side documents set aside, which gave no statistics",
}


@dataclass(frozen=True)
class Row:
    """One cell with its figures; increases are shares of the dense model's bits per byte."""

    name: str
    scene: str
    labels: Mapping[str, Any]
    parameters: int
    removed: float
    vocabulary: int
    dense_parameters: int
    dense_vocabulary: int
    calibration_tokens: int
    seconds: float
    bits: Mapping[str, float]
    dense: Mapping[str, float]
    stderr: Mapping[str, float]  # of the increase, where it was measured
    accuracy: float | None
    dense_accuracy: float | None
    dense_interval: tuple[float, float] | None
    result: Mapping[str, Any]

    def increase(self, text: str) -> float | None:
        """How much larger than the dense model's bits per byte, over the same bytes; None where it was not measured."""
        return self.bits[text] / self.dense[text] - 1 if text in self.bits else None

    def __getitem__(self, label: str) -> Any:
        return self.scene if label == "scenario" else self.labels.get(label)


Picture = Callable[[Sequence[Row], Path], None]


def as_row(cell: Cell, result: Mapping[str, Any]) -> Row:
    """The figures of one result."""
    measured = dict(result["texts"])
    if result["aside"] is not None:
        measured[ASIDE] = result["aside"]
    asked = result["questions"]
    return Row(
        cell.name, cell.scene.name, cell.labels,
        result["expert"]["parameters"], result["removed_share"], result["expert"]["vocabulary"],
        result["dense"]["parameters"], result["dense"]["vocabulary"],
        sum(row["tokens_of_text"] for row in {row["text"]: row for row in result["calibration"]}.values()),
        result["seconds"],
        {text: found["bits_per_byte"] for text, found in measured.items()},
        {text: found["dense"] for text, found in measured.items()},
        {text: stderr for text, found in measured.items() if (stderr := found.get("increase_stderr")) is not None},
        asked and asked["accuracy"], asked and asked["dense"]["accuracy"],
        tuple(asked["dense"]["interval"]) if asked else None,
        result,
    )  # fmt: skip


def write_pages(
    out: Path,
    telling: Telling,
    rows: Sequence[Row],
    missing: Mapping[str, str],
    dense: Mapping[str, Mapping[str, float]],
    more: Mapping[str, Any],
    lines: Sequence[str],
) -> None:
    """Writes ``out`` with the suffixes .json, .csv, .md and, once there is something to draw, .png."""
    found = environment()
    whole = {
        "study": telling.study.name,
        "command": telling.command(),
        "settings": telling.settings(),
        "versions": found["versions"],
        "dense": dense,
        "cells": [
            {"name": row.name, "scenario": row.scene, "labels": dict(row.labels), **row.result} for row in rows
        ],
        "not_run": dict(missing),
        **more,
    }  # fmt: skip
    write_json(out.with_name(out.name + ".json"), whole)
    _write_csv(out.with_name(out.name + ".csv"), telling, rows)
    if rows:
        with written_whole(out.with_name(out.name + ".png")) as part:
            telling.study.picture(rows, part)
    with written_whole(out.with_name(out.name + ".md")) as part:
        part.write_text(page(out.name, telling, rows, missing, dense, found, lines), encoding="utf-8")


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Names of the texts that any row was measured on, in a fixed order."""
    names = {text for row in rows for text in row.bits}
    return [text for text in (*TEXTS, ASIDE) if text in names] + sorted(names - {*TEXTS, ASIDE})


def _write_csv(path: Path, telling: Telling, rows: Sequence[Row]) -> None:
    labels = _labels(telling)
    texts = texts_of(rows)
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        figures = [f"{what} {text}" for text in texts for what in ("bits per byte", "dense", "increase", "stderr")]
        writer.writerow(
            ["cell", "scenario", *labels, "parameters", "removed share", "tokens kept", "calibration tokens",
             *figures, "accuracy", "dense accuracy", "prune seconds"]
        )  # fmt: skip
        for row in rows:
            measured = [
                value
                for text in texts
                for value in (row.bits.get(text), row.dense.get(text), row.increase(text), row.stderr.get(text))
            ]
            writer.writerow(
                [row.name, row.scene, *(row[label] for label in labels), row.parameters, row.removed, row.vocabulary,
                 row.calibration_tokens, *measured, row.accuracy, row.dense_accuracy, row.seconds]
            )  # fmt: skip


def page(
    name: str,
    telling: Telling,
    rows: Sequence[Row],
    missing: Mapping[str, str],
    dense: Mapping[str, Mapping[str, float]],
    found: Mapping[str, Any],
    lines: Sequence[str],
) -> str:
    """The page as Markdown."""
    study, options = telling.study, telling.options
    texts = texts_of(rows)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    out = [
        f"# {study.title}", "", f"`{telling.command()}`", "", study.about, "",
        f"{Path(options.model).name}, {options.tokens:,} calibration tokens in windows of {options.window} unless a "
        f"column says otherwise; figures are the increase of bits per byte over the dense model in %, ± its standard "
        f"error, paired by window, where that was measured, on "
        f"{options.eval_tokens:,} tokens of each text, second half of windows of 512, model folders in torch "
        f"({options.device})" + "".join(f"; *{text}*: {COLUMNS[text]}" for text in texts if text in COLUMNS)
        + ". The seconds are those of the prune's stages, those shared with other cells included.",
    ]  # fmt: skip
    if said := study.sentences(rows):
        out += ["", *(f"- {sentence}" for sentence in said)]
    for heading, table in _tables(telling, rows, dense):
        out += ["", f"## {heading}", "", *table]
    if lines:
        out += ["", *lines]
    out += ["", *_not_run(missing, len(rows))]
    if rows:
        out += ["", f"![{study.title}]({name}.png)"]
    out += [
        "",
        f"{_machines(rows, found)}; Python {found['python']}; {versions}. Every figure: [{name}.json]({name}.json).",
    ]
    return "\n".join(out) + "\n"


def _machines(rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    """The processors that the cells were measured on."""
    names = sorted({row.result.get("environment", found)["cpu"] for row in rows}) or [found["cpu"]]
    return names[0] if len(names) == 1 else f"Measured on {' and '.join(names)}, so that seconds do not compare"


def _tables(
    telling: Telling, rows: Sequence[Row], dense: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, list[str]]]:
    """A heading and a table for each group of rows, the dense row first."""
    study = telling.study
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scene, *(row[label] for label in study.groups)), []).append(row)
    for (scene, *values), members in groups.items():
        texts = texts_of(members)
        columns = [column for column in study.columns if any(row[column] is not None for row in members)]
        asked = [row for row in members if row.accuracy is not None]
        trimmed = any(row.vocabulary != row.dense_vocabulary for row in members)
        heads = [
            *columns,
            *(["vocabulary"] if trimmed else []),
            "parameters",
            "removed",
            *texts,
            *(["questions right"] if asked else []),
            "seconds",
        ]
        first = ["dense", *[""] * (len(columns) - 1)]
        first += [f"{members[0].dense_vocabulary:,}"] if trimmed else []
        first += [f"{members[0].dense_parameters / 1e6:.1f} M", "0 %"]
        first += [f"{dense[scene][text]:.3f} bits" if text in dense.get(scene, {}) else "" for text in texts]
        first += [show("share", asked[0].dense_accuracy)] if asked else []
        table = [_line(heads), _line(["---"] * len(heads)), _line([*first, ""])]
        for row in members:
            cells = [show(column, row[column]) for column in columns]
            cells += [f"{row.vocabulary:,}"] if trimmed else []
            cells += [f"{row.parameters / 1e6:.1f} M", f"{row.removed:.1%}".replace("%", " %")]
            cells += [percent(row.increase(text), row.stderr.get(text)) for text in texts]
            cells += [show("share", row.accuracy)] if asked else []
            table.append(_line([*cells, f"{row.seconds:.0f}"]))
        yield (
            ", ".join([scene, *(show(label, value) for label, value in zip(study.groups, values, strict=True))]),
            table,
        )


def _not_run(missing: Mapping[str, str], done: int) -> list[str]:
    if not missing:
        return [f"All {done} cells of the study were run."]
    failed = {name: reason for name, reason in missing.items() if reason}
    names = [f"`{name}`" for name in missing if name not in failed]
    lines = []
    if names:
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        lines.append(f"Not run yet, {len(names)} of {done + len(missing)} cells: {shown}.")
    lines += [f"`{name}` did not come out: {' '.join(reason.split())}" for name, reason in failed.items()]
    return "\n\n".join(lines).split("\n")


def _labels(telling: Telling) -> list[str]:
    return list(dict.fromkeys([*telling.study.groups, *telling.study.columns]))


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as a Markdown table, the heading first."""
    return [_line(rows[0]), _line(["---"] * len(rows[0])), *map(_line, rows[1:])]


def write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """The same rows as CSV."""
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def show(label: str, value: Any) -> str:
    """A label's value as a reader wants it."""
    if value is None:
        return ""
    if label in ("ratio", "share"):
        return f"{value:.1%}".replace(".0%", "%").replace("%", " %")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
