"""A data set of the Hugging Face hub, or a local folder that `datasets` reads; no code of the data set is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cusprun.errors import Failed, InvalidRequest, MissingPackage

if TYPE_CHECKING:
    from cusprun.corpora.catalog import HubSource
    from cusprun.corpora.parsers import Draft


def read_hub(source: HubSource) -> Iterator[Draft]:
    """One draft per row, at most ``source.rows``; ``source.columns`` names the data set's columns for ours.

    Rows are read like those of a jsonl file: text, or question and answer, or messages, or prompt, choices, answer.
    """
    from cusprun.corpora.own import read_row
    from cusprun.corpora.parsers import Draft

    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets", "eval", f"the data set {source.package}") from error
    try:
        rows = datasets.load_dataset(
            source.package, source.configuration, split=source.split, revision=source.version, streaming=True
        )
        for number, row in enumerate(rows.take(source.rows)):
            row = {ours: row[theirs] for ours, theirs in source.columns.items()} if source.columns else row
            for piece, (text, turns, question) in enumerate(read_row(row, f"{source.package} row {number}")):
                key = f"{number}" if not piece else f"{number}.{piece}"
                yield Draft(key, text, turns, question, group=f"{number}")
    except InvalidRequest:
        raise
    except Exception as error:  # datasets raises many kinds of its own and of its network libraries
        raise Failed(f"the data set {source.package} at {source.version} could not be read: {error}") from error
