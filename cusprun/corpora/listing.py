"""What stands behind `corpora list | pull | show`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cusprun.corpora.catalog import Entry, Source, find_entries, load_catalog
from cusprun.corpora.document import Document
from cusprun.corpora.library import open_shelf
from cusprun.corpora.sources import is_cached, missing_client
from cusprun.corpora.split import Side
from cusprun.errors import InvalidRequest


@dataclass(frozen=True)
class Row:
    """One line of `corpora list`. ``bytes`` is the package's size (entries share packages), None for a data set."""

    name: str
    title: str
    language: str
    domain: str
    task: str | None
    licence: str
    source: str
    bytes: int | None
    cached: bool
    tried: bool
    use: str  # default, cell, named, or evaluation for entries that are kept for it


@dataclass(frozen=True)
class Sample:
    """One document of `corpora show`, with the side it is on."""

    side: Side
    document: Document


def list_entries() -> list[Row]:
    """One row per entry of the catalog, in its order."""
    return [_row(entry) for entry in load_catalog()]


def _row(entry: Entry) -> Row:
    source = entry.source
    return Row(
        name=entry.name,
        title=entry.title,
        language=entry.language,
        domain=entry.domain,
        task=entry.task,
        licence=entry.licence,
        source=f"{source.kind}:{source.package}@{source.version}",
        bytes=source.bytes if isinstance(source, Source) else None,
        cached=isinstance(source, Source) and is_cached(source),
        tried=entry.tried,
        use="evaluation" if entry.reserve and entry.use != "named" else entry.use,
    )


def download_bytes(entries: Iterable[Entry]) -> int:
    """Bytes that these entries would still fetch; a package shared by several counts once."""
    sources = [entry.source for entry in entries if isinstance(entry.source, Source)]
    missing = {source.sha256: source.bytes for source in sources if not is_cached(source)}
    return sum(missing.values())


def unreachable(entries: Iterable[Entry]) -> list[str]:
    """One line per client that these entries would be fetched with and that is not here."""
    needed: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry.source, Source) and (client := missing_client(entry.source)):
            needed.setdefault(client, []).append(entry.name)
    return [f"there is no {client} here, and {', '.join(names)} is fetched with it" for client, names in needed.items()]


def pull(names: Sequence[str]) -> list[Row]:
    """Fetches, checks and reads these entries (all of them that are used by themselves where none is named)."""
    from cusprun.progress import track

    entries = find_entries(names) if names else [entry for entry in load_catalog() if entry.use == "default"]
    for entry in track(entries, "corpora", total=len(entries)):
        open_shelf(entry)
    return [_row(entry) for entry in entries]


def show(name: str, count: int = 3) -> list[Sample]:
    """The first ``count`` documents of each side. Raises InvalidRequest for an unknown name or count < 1."""
    if count < 1:
        raise InvalidRequest(f"the number of documents to show has to be at least 1, not {count}")
    (entry,) = find_entries([name])
    shelf = open_shelf(entry)
    sides: tuple[Side, ...] = ("calibration", "held-out")
    return [Sample(side, shelf.documents[number]) for side in sides for number in shelf.numbers(side)[:count]]
