"""Where an expert comes from: base model and texts with their licences, and no path of a machine.

A base model or a text of the builder's own is named without the folder it lay in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cusprun.deploy.expert import Expert
from cusprun.errors import InvalidRequest, MissingPackage

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
EXPRESSION = re.compile(r" (?:AND|OR|WITH) ")
OWN = "file:"  # what the name of a user's own text begins with


@dataclass(frozen=True)
class Text:
    """A text of the catalog that decided what goes; ``source`` is a package and its version."""

    name: str
    licence: str
    attribution: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """What an expert was made of."""

    base: str  # its name
    hub_id: str | None
    base_sha256: str | None
    licence: str | None  # of the base model and so of the expert, as it was found
    texts: tuple[Text, ...]
    own_texts: int  # that the builder brought
    known: bool  # whether the texts are known

    @property
    def licences(self) -> tuple[str, ...]:
        """SPDX ids of everything here, each once."""
        own = [self.licence] if self.licence else []
        parts = {part for one in (*own, *(text.licence for text in self.texts)) for part in EXPRESSION.split(one)}
        return tuple(sorted({spdx_id(part) or part for part in parts}))


def trace(expert: Expert) -> Provenance:
    """The provenance of an expert. Raises InvalidRequest where expert.json is damaged."""
    try:
        base = expert.card["base"]
        name, hub_id, licence = str(base["id"]), base.get("hub_id"), base.get("licence")
        rows = expert.card.get("texts")
        if rows is None and expert.report is not None:
            rows = [row for row in expert.report["corpora"] if row["side"] == "calibration"]
        catalog = {
            row["entry"]: Text(row["entry"], row["licence"], row["attribution"], row["source"], row["sha256"])
            for row in rows or ()
            if not row["entry"].startswith(OWN)
        }
        own = {row["entry"] for row in rows or () if row["entry"].startswith(OWN)}
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{expert.folder}: expert.json is damaged: {error!r}; build the expert again") from error
    if hub_id is not None and not (isinstance(hub_id, str) and HUB_ID.fullmatch(hub_id)):
        raise InvalidRequest(f"{expert.folder}: expert.json is damaged: hub_id {hub_id!r}; build the expert again")
    return Provenance(
        base=name if hub_id else base_name(name),
        hub_id=hub_id,
        base_sha256=base.get("sha256"),
        licence=str(licence) if licence else None,
        texts=tuple(catalog[key] for key in sorted(catalog)),
        own_texts=len(own),
        known=rows is not None,
    )


def base_name(name: str) -> str:
    """The last part of a path of either kind of system."""
    return PurePosixPath(PureWindowsPath(name).as_posix()).name


def spdx_id(licence: str | None) -> str | None:
    """A licence as SPDX spells it (``apache-2.0`` is Apache-2.0); None where the list has no such licence."""
    if licence is None:
        return None
    known, key = _list(), licence.strip().lower()
    for suffix in ("-or-later", "-only"):
        if key.endswith(suffix) and key.removesuffix(suffix) in known:
            return known[key.removesuffix(suffix)].stem + suffix
    return known[key].stem if key in known else None


def licence_text(licence: str) -> str | None:
    """The text of a licence by its SPDX id; None where the list has none."""
    known, key = _list(), licence.lower().removesuffix("-or-later").removesuffix("-only")
    path = known.get(licence.lower()) or known.get(key)
    if path is None:
        return None
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").strip() + "\n"


@cache
def _list() -> dict[str, Path]:
    """Files of the SPDX licence list's package by lower-case id; the package itself is not imported."""
    spec = find_spec("spdx")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("spdx", "ship", "a bundle's licences")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {path.stem.lower(): path for path in sorted(folder.glob("*.txt"))}


def as_metadata(provenance: Provenance) -> dict[str, Any]:
    """licence keys of a Hugging Face model card."""
    if provenance.licence is None:
        return {}
    if (found := spdx_id(provenance.licence)) is not None:
        return {"license": found.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", provenance.licence.lower())}
