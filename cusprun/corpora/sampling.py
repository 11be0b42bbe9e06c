"""Which documents a scenario gets: calibration text by dimension, held-out text and questions for evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cusprun.corpora.catalog import Entry, Source, cell, check_scenario, load_catalog, matches
from cusprun.corpora.document import Document, OwnText, Scenario, WeightedDocument
from cusprun.corpora.library import Shelf, open_own, open_shelf, without_leaks
from cusprun.corpora.sources import missing_client
from cusprun.errors import InvalidRequest

FOCUS = 0.5  # share of each dimension's tokens that comes from the scenario's own cell


def calibration_entries(scenario: Scenario, named: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Every catalog entry that :func:`dimension_corpora` draws on: the scenario's cell, and what varies around it."""
    found = {entry.name: entry for entry in cell(scenario, named)}
    for dimension, value in scenario.given().items():
        found |= {entry.name: entry for entry in _around(scenario, dimension, value, named)}
    if not scenario.given():
        found = {entry.name: entry for entry in load_catalog() if _default(entry, named)}
    return tuple(entry for entry in load_catalog() if entry.name in found)


def evaluation_entries(scenario: Scenario, named: Sequence[str] = ()) -> dict[str, tuple[Entry, ...]]:
    """The entries behind the keys of :func:`evaluation_texts`.

    ``scenario`` is the cell; ``domain`` and ``general`` are entries kept for evaluation, of the scenario's language
    (English where none is given) and its domain, or the general one. Of these, an entry that cannot be fetched on this
    machine (it needs npm or apt-get and there is none) is left out: the weights do not depend on it.
    """
    language, domain = scenario.language or "en", scenario.domain
    reserved = [entry for entry in load_catalog() if entry.reserve and (entry.use != "named" or entry.name in named)]
    reserved = [entry for entry in reserved if entry.language == language and can_fetch(entry)]
    found = {
        "scenario": cell(scenario, named),
        "domain": tuple(entry for entry in reserved if domain and entry.domain == domain),
        "general": tuple(entry for entry in reserved if entry.domain == "general" and domain != "general"),
    }
    return {name: entries for name, entries in found.items() if entries}


def can_fetch(entry: Entry) -> bool:
    """Whether the entry is in the cache or its client is here."""
    return not isinstance(entry.source, Source) or missing_client(entry.source) is None


def all_entries(scenario: Scenario, named: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Every catalog entry that a build of the scenario reads: what has to be fetched before it can go offline."""
    names = {entry.name for entry in calibration_entries(scenario, named)}
    names |= {entry.name for entries in evaluation_entries(scenario, named).values() for entry in entries}
    return tuple(entry for entry in load_catalog() if entry.name in names)


def _default(entry: Entry, named: Sequence[str]) -> bool:
    return not entry.reserve and (entry.use == "default" or entry.name in named)


def _around(scenario: Scenario, dimension: str, value: str, named: Sequence[str]) -> list[Entry]:
    """Entries outside the cell that hold the dimension fixed.

    Those for default use and those whose package the cell needs anyway; where there are none, all that this machine
    can fetch.
    """
    own = cell(scenario, named)
    packages = {entry.source.sha256 for entry in own if isinstance(entry.source, Source)}
    fitting = [entry for entry in load_catalog() if matches(entry, dimension, value) and entry not in own]
    fitting = [entry for entry in fitting if not entry.reserve and (entry.use != "named" or entry.name in named)]
    near = [entry for entry in fitting if _default(entry, named) or getattr(entry.source, "sha256", "") in packages]
    return near or [entry for entry in fitting if can_fetch(entry)]


def dimension_corpora(
    scenario: Scenario,
    own: Sequence[OwnText] = (),
    dims: Mapping[str, Path] | None = None,
    *,
    focus: float = FOCUS,
    named: Sequence[str] = (),
) -> dict[str, list[WeightedDocument]]:
    """For each given dimension, calibration text that holds it fixed and varies the others; one corpus per ``dims``.

    ``focus`` is the share of the weight that goes to the scenario's own cell where there is other text too. Within
    either part an entry's weight grows with the square root of its size, so that none swamps the others. ``own`` text
    belongs to the scenario and to every dimension, with its weight relative to all catalog text = 1. Without any
    dimension there is one corpus, ``general``. Weights in a corpus add up to 1 over its entries.
    """
    if not 0 <= focus <= 1:
        raise InvalidRequest(f"focus has to lie between 0 and 1, not {focus}")
    check_scenario(scenario, own=bool(own), named=named)
    entries = calibration_entries(scenario, named)
    shelves = [open_shelf(entry) for entry in entries]
    mine, extra = open_all(own, scenario), open_dims(dims)
    kept_out = [open_shelf(entry) for group in evaluation_entries(scenario, named).values() for entry in group]
    texts = without_leaks([*shelves, *mine, *extra.values()], kept_out)
    for shelf in [*mine, *extra.values()]:
        if not texts[shelf.name]:
            raise InvalidRequest(f"{shelf.name}: no text is left for calibration after the split; give more text")

    cell_names = {entry.name for entry in cell(scenario, named)}
    corpora: dict[str, list[WeightedDocument]] = {}
    for dimension, value in scenario.given().items() or {"general": ""}.items():
        fixed = [entry.name for entry in entries if dimension == "general" or matches(entry, dimension, value)]
        inside = [name for name in fixed if name in cell_names and texts[name]]
        around = [name for name in fixed if name not in cell_names and texts[name]]
        shares = _shares(inside, texts, focus if around else 1.0) | _shares(around, texts, 1 - focus if inside else 1.0)
        shares |= {shelf.name: text.weight for shelf, text in zip(mine, own, strict=True)}
        corpora[dimension] = _weighted(shares, texts)
    for name, shelf in extra.items():
        corpora[name] = _weighted({shelf.name: 1.0}, texts)
    return corpora


def general_entries(scenario: Scenario, named: Sequence[str] = ()) -> tuple[Entry, ...]:
    """The catalog entries that :func:`general_text` reads."""
    language = scenario.language or "en"
    entries = (entry for entry in load_catalog() if entry.language == language and entry.domain == "general")
    return tuple(entry for entry in entries if _default(entry, named))


def general_text(
    scenario: Scenario,
    own: Sequence[OwnText] = (),
    dims: Mapping[str, Path] | None = None,
    *,
    named: Sequence[str] = (),
) -> list[WeightedDocument]:
    """Calibration text of the general domain in the scenario's language (English where none is given).

    Nothing in it resembles held-out text, the user's ``own`` and ``dims`` included.
    """
    shelves = [open_shelf(entry) for entry in general_entries(scenario, named)]
    kept_out = [open_shelf(entry) for group in evaluation_entries(scenario, named).values() for entry in group]
    texts = without_leaks(shelves, [*kept_out, *open_all(own, scenario), *open_dims(dims).values()])
    return _weighted(_shares([shelf.name for shelf in shelves if texts[shelf.name]], texts, 1.0), texts)


def evaluation_texts(
    scenario: Scenario,
    own: Sequence[OwnText] = (),
    dims: Mapping[str, Path] | None = None,
    *,
    named: Sequence[str] = (),
) -> dict[str, list[Document]]:
    """Held-out documents: ``scenario`` (the cell's and the user's own), ``domain`` and ``general`` (entries kept for
    evaluation), and one list per ``dims``. A key is present where there is text.
    """
    check_scenario(scenario, own=bool(own), named=named)
    found: dict[str, list[Document]] = {}
    for name, entries in evaluation_entries(scenario, named).items():
        found[name] = [document for entry in entries for document in _held_out(open_shelf(entry))]
    for shelf in open_all(own, scenario):
        found["scenario"] = [*found.get("scenario", []), *_held_out(shelf)]
    for name, shelf in open_dims(dims).items():
        found[name] = _held_out(shelf)
    return {name: documents for name, documents in found.items() if documents}


def questions(scenario: Scenario, own: Sequence[OwnText] = (), *, named: Sequence[str] = ()) -> list[Document]:
    """Held-out documents of the cell that carry a multiple-choice question; empty where the cell has none."""
    texts = evaluation_texts(scenario, own, named=named).get("scenario", [])
    return [document for document in texts if document.question is not None]


def _held_out(shelf: Shelf) -> list[Document]:
    return [shelf.documents[number] for number in shelf.numbers("held-out")]


def open_all(own: Sequence[OwnText], scenario: Scenario) -> list[Shelf]:
    """The user's files in order. Raises InvalidRequest where two have one name."""
    names = [text.path.name for text in own]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidRequest(f"--corpus was given two files named {', '.join(twice)}; rename one")
    return [open_own(text.path, own_name(text), scenario) for text in own]


def own_name(text: OwnText) -> str:
    """What the documents of a file of the user's have for their entry."""
    return f"file:{text.path.name}"


def open_dims(dims: Mapping[str, Path] | None) -> dict[str, Shelf]:
    """The files of the further dimensions, by dimension."""
    return {name: open_own(path, f"dim:{name}", Scenario()) for name, path in (dims or {}).items()}


def _shares(names: Sequence[str], texts: Mapping[str, Sequence[Document]], total: float) -> dict[str, float]:
    """Shares that grow with the square root of an entry's characters and add up to ``total``."""
    roots = {name: math.sqrt(sum(len(document.text) for document in texts[name])) for name in names}
    return {name: total * root / sum(roots.values()) for name, root in roots.items()}


def _weighted(shares: Mapping[str, float], texts: Mapping[str, Sequence[Document]]) -> list[WeightedDocument]:
    return [
        WeightedDocument(document, share) for name, share in shares.items() if share > 0 for document in texts[name]
    ]
