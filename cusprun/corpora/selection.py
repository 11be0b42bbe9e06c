"""What a build takes of the text and keeps: calibration windows by dimension, held-out texts, questions.

The windows go to one safetensors file, the held-out side to JSON lines, both rendered for one tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.corpora.catalog import cell, load_catalog
from cusprun.corpora.document import Document, OwnText, Question, Scenario, WeightedDocument, fingerprint
from cusprun.corpora.library import OWN_SIDES
from cusprun.corpora.packing import FEWEST, Piece, pack_windows, render
from cusprun.corpora.parsers import VERSION
from cusprun.corpora.sampling import dimension_corpora, evaluation_texts, general_text, own_name, questions
from cusprun.errors import InvalidRequest
from cusprun.files import sha256_file, sha256_tree, written_whole
from cusprun.recipe import Recipe

GENERAL = "general"
ASIDE = "aside/"
ASIDE_WINDOWS = 4  # of each dimension
ASIDE_EACH = 16  # one calibration document in so many is set aside


@dataclass(frozen=True)
class RenderedText:
    """Documents as one tokenizer's model reads them: by dimension; of each text the original that it is a piece of; and
    the texts of the scenario's own cell and of the user's ``--corpus``.
    """

    by_dimension: dict[str, list[str]]
    originals: dict[str, str]
    own: set[str]


@dataclass(frozen=True)
class Selection:
    """Which text: a scenario with the user's own text and dimensions, and how much of it."""

    scenario: Scenario
    own: tuple[OwnText, ...]
    dims: Mapping[str, Path]
    include: tuple[str, ...]
    tokens: int  # of calibration, shared by the dimensions
    window: int
    questions: int  # at most
    seed: int
    general: float = 0.0  # share of the calibration tokens that is general text of the scenario's language
    weights: Mapping[str, float] = field(default_factory=dict)  # of the dimensions in the rest; 1 where not named

    @classmethod
    def of(cls, recipe: Recipe, scenario: Scenario, own: tuple[OwnText, ...], dims: Mapping[str, Path]) -> Selection:
        """What a recipe asks for, whose scenario and files were read."""
        return cls(
            scenario, own, dims, recipe.include, recipe.tokens, recipe.window, recipe.questions, recipe.seed,
            recipe.general, recipe.weights,
        )  # fmt: skip

    def key(self) -> str:
        """Hex sha256 over everything that decides which text comes out: wishes, the user's files, the catalog."""
        own = [[OWN_SIDES, _sha256(text.path), text.weight] for text in self.own]
        dims = {name: [OWN_SIDES, _sha256(path)] for name, path in self.dims.items()}
        catalog = [entry.model_dump(mode="json", exclude={"tried"}) for entry in load_catalog()]
        sizes = [self.tokens, self.window, self.questions, self.seed, self.general, dict(self.weights)]
        values = [VERSION, asdict(self.scenario), own, dims, self.include, sizes, catalog]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @cached_property
    def corpora(self) -> dict[str, list[WeightedDocument]]:
        """Calibration documents by dimension; ``general`` joins them where it has a share and the language has text.

        Raises InvalidRequest where a weight names no dimension.
        """
        corpora = dimension_corpora(self.scenario, self.own, self.dims, named=self.include)
        if unknown := sorted(set(self.weights) - set(corpora)):
            raise InvalidRequest(
                f"--weight {unknown[0]}: no such dimension; dimensions of this scenario: {', '.join(corpora)}"
            )
        if self.general and self.scenario.domain != "general" and GENERAL not in corpora:
            text = general_text(self.scenario, self.own, self.dims, named=self.include)
            corpora |= {GENERAL: text} if text else {}
        return corpora

    def rendered(self, tokenizer: Any) -> RenderedText:
        """All calibration documents as the model reads them; those set aside are not among them."""
        names = {entry.name for entry in cell(self.scenario, self.include)} | {own_name(text) for text in self.own}
        texts: dict[str, list[str]] = {}
        originals: dict[str, str] = {}
        own, known = set[str](), dict[str, str]()
        for dimension, documents in self.corpora.items():
            texts[dimension] = []
            for document in (item.document for item in _used(documents, aside=False)):
                if document.id not in known:
                    known[document.id] = render(document, tokenizer)
                text = known[document.id]
                texts[dimension].append(text)
                originals[text] = document.original or document.id
                if document.entry in names:
                    own.add(text)
        return RenderedText(texts, originals, own)

    def shares(self, dimensions: Sequence[str]) -> dict[str, int]:
        """Calibration tokens of each dimension, the fewest windows at least.

        The general text has its share, the weights split the rest.
        """
        own = [name for name in dimensions if name != GENERAL or not self.general or len(dimensions) == 1]
        general = self.general if len(own) < len(dimensions) else 0.0
        total = sum(self.weights.get(name, 1.0) for name in own)
        parts = {name: (1 - general) * self.weights.get(name, 1.0) / total for name in own}
        if general:
            parts[GENERAL] = general
        return {name: max(int(self.tokens * part), FEWEST * self.window) for name, part in parts.items()}

    def windows(self, tokenizer: Any) -> dict[str, np.ndarray]:
        """Calibration windows by dimension, (n, window) int64 each.

        A text that belongs to several dimensions is in the windows of one of them where there is enough of others: what
        is fitted sees more text, and what judges it has not been fitted. Raises InvalidRequest where the text is too
        short.
        """
        dealt: set[Piece] = set()
        return {
            name: pack_windows(_used(self.corpora[name], aside=False), tokenizer, tokens, self.window, self.seed, dealt)
            for name, tokens in self.shares(list(self.corpora)).items()
        }

    def _aside(self, corpora: Mapping[str, list[WeightedDocument]], tokenizer: Any) -> dict[str, np.ndarray]:
        """Windows of the documents set aside, where a dimension has enough of them."""
        found = {}
        for name, documents in corpora.items():
            if aside := _used(documents, aside=True):
                try:
                    found[ASIDE + name] = pack_windows(
                        aside, tokenizer, ASIDE_WINDOWS * self.window, self.window, self.seed
                    )
                except InvalidRequest:  # too few documents: this dimension has no say in the check
                    continue
        return found

    def write(self, tokenizer: Any, windows_path: Path, texts_path: Path) -> dict[str, Any]:
        """Writes both files and returns what they were made of, an entry of the catalog a row.

        Raises InvalidRequest where the text is too short for the windows.
        """
        from safetensors.numpy import save_file

        corpora = self.corpora
        windows = self.windows(tokenizer) | self._aside(corpora, tokenizer)
        texts = evaluation_texts(self.scenario, self.own, self.dims, named=self.include)
        asked = sorted(questions(self.scenario, self.own, named=self.include), key=_scattered)[: self.questions]
        with written_whole(windows_path) as part:
            save_file(windows, part)
        with written_whole(texts_path) as part, part.open("w", encoding="utf-8") as file:
            for name, documents in texts.items():
                rendered = [render(document, tokenizer) for document in sorted(documents, key=_scattered)]
                file.write(json.dumps({"text": name, "documents": rendered}, ensure_ascii=False) + "\n")
            for document in asked:
                if document.question is not None:
                    file.write(json.dumps({"question": asdict(document.question)}, ensure_ascii=False) + "\n")
        rows = [
            row
            for name, documents in corpora.items()
            for row in _rows(name, "calibration", documents, int(windows[name].size))
        ]
        rows += [row for name, documents in texts.items() for row in _rows(name, "held-out", documents, None)]
        return {"corpora": rows, "questions": len(asked)}


def read_windows(path: Path) -> dict[str, np.ndarray]:
    """Calibration windows by dimension, (n, window) int64 each."""
    return {name: ids for name, ids in _load(path).items() if not name.startswith(ASIDE)}


def read_aside(path: Path) -> dict[str, np.ndarray]:
    """Windows of calibration documents that no moment is taken of, by dimension: what choices are checked on."""
    return {name.removeprefix(ASIDE): ids for name, ids in _load(path).items() if name.startswith(ASIDE)}


def _load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    windows = load_file(path)
    return {name: windows[name] for name in sorted(windows)}


def read_texts(path: Path) -> tuple[dict[str, list[str]], list[Question]]:
    """Held-out documents by name of the text, rendered, and the questions."""
    texts: dict[str, list[str]] = {}
    asked = []
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "question" in row:
                asked.append(
                    Question(row["question"]["prompt"], tuple(row["question"]["choices"]), row["question"]["answer"])
                )
            else:
                texts[row["text"]] = row["documents"]
    return texts, asked


def _used(documents: list[WeightedDocument], *, aside: bool) -> list[WeightedDocument]:
    """Those set aside, or the others; a corpus of few documents sets none aside."""
    if len(documents) < 2 * ASIDE_EACH:
        return [] if aside else documents
    return [item for item in documents if (int(_scattered(item.document)[:8], 16) % ASIDE_EACH == 0) == aside]


def _scattered(document: Document) -> str:
    """A fixed order that mixes entries, so that the first tokens of a text are a sample of all of it."""
    return hashlib.sha256(document.id.encode()).hexdigest()


def _rows(
    text: str, side: str, documents: Sequence[Document | WeightedDocument], tokens: int | None
) -> list[dict[str, Any]]:
    entries = {entry.name: entry for entry in load_catalog()}
    by_entry: dict[str, list[Document]] = {}
    for item in documents:
        document = item.document if isinstance(item, WeightedDocument) else item
        by_entry.setdefault(document.entry, []).append(document)
    rows = []
    for name, group in sorted(by_entry.items()):
        known = entries.get(name)
        rows.append(
            {
                "text": text,
                "side": side,
                "entry": name,
                "documents": len(group),
                "tokens_of_text": tokens,
                "licence": known.licence if known else "the user's own",
                "attribution": known.attribution if known else None,
                "source": f"{known.source.kind}:{known.source.package}@{known.source.version}" if known else None,
                "sha256": fingerprint(group),
            }
        )
    return rows


def _sha256(path: Path) -> str:
    return sha256_tree(path) if path.is_dir() else sha256_file(path)
