"""From a package in the cache to documents with sides, without a network: fetched files are put there by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cusprun.corpora.catalog import Entry, HubSource, Source
from cusprun.corpora.document import OwnText, Scenario
from cusprun.corpora.library import is_read, open_own, open_shelf
from cusprun.corpora.sampling import dimension_corpora, evaluation_texts, questions
from cusprun.corpora.sources import cached_file, check, fetch, is_cached
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import sha256_file
from tests.corpora.archives_made import make_wheel

TEXT = "The tenant pays the rent on the first day of month {n}, and section {n} of the lease says how. "


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))


def made_entry(tmp_path: Path, reserve: str | None = None, texts: int = 30) -> Entry:
    files = {f"pkg/data/{n:02}.txt": " ".join(TEXT.format(n=n * 100 + k) for k in range(5)) for n in range(texts)}
    wheel = make_wheel(tmp_path / "pkg-1.0-py3-none-any.whl", files)
    source = Source(
        kind="pypi",
        package="pkg",
        version="1.0",
        file=wheel.name,
        sha256=sha256_file(wheel),
        bytes=wheel.stat().st_size,
        members=("pkg/data/*.txt",),
        parser="plain",
    )
    target = cached_file(source)
    target.parent.mkdir(parents=True)
    wheel.rename(target)
    return Entry(
        name="leases",
        title="Leases",
        language="en",
        domain="legal",
        task=None,
        licence="CC0-1.0",
        licence_note="made here",
        attribution="the tests",
        use="default",
        tried=True,
        reserve=reserve,
        source=source,
    )


def test_an_entry_is_read_once_and_then_comes_from_the_cache(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    assert is_cached(entry.source)
    assert not is_read(entry)
    first = open_shelf(entry)
    assert is_read(entry)
    cached_file(entry.source).unlink()
    again = open_shelf(entry)
    assert again.documents == first.documents
    assert again.sides == first.sides
    assert {document.id for document in first.documents} == {f"leases/{n:02}" for n in range(30)}


def test_a_reserved_entry_has_no_calibration_side(tmp_path: Path) -> None:
    shelf = open_shelf(made_entry(tmp_path, reserve="evaluation"))
    assert not shelf.numbers("calibration")
    assert shelf.numbers("held-out")


def test_an_entry_without_text_fails(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    empty = entry.model_copy(update={"source": entry.source.model_copy(update={"members": ("none/*",)})})
    with pytest.raises(Failed, match="no text"):
        open_shelf(empty)
    assert not is_read(empty)


def test_a_wrong_checksum_names_both_hashes(tmp_path: Path) -> None:
    source = made_entry(tmp_path).source
    (tmp_path / "other").write_bytes(b"tampered")
    with pytest.raises(Failed, match="checksum mismatch") as caught:
        check(tmp_path / "other", source)
    assert source.sha256 in str(caught.value)
    assert hashlib.sha256(b"tampered").hexdigest() in str(caught.value)


def test_a_package_that_was_changed_in_the_cache_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = made_entry(tmp_path)
    cached_file(entry.source).write_bytes(b"changed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Failed, match="could not be fetched"):
        open_shelf(entry)
    assert "was changed since it was fetched" in capsys.readouterr().err


def test_a_cache_that_cannot_be_made_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made_entry(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(Failed, match="CUSPRUN_CACHE"):
        open_shelf(entry)


def test_a_client_that_is_missing_or_fails_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made_entry(tmp_path).source
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, hint in (("npm", "no npm here"), ("debian", "no apt-get here")):
        with pytest.raises(Failed, match=hint):
            fetch(source.model_copy(update={"kind": kind, "sha256": "0" * 64}))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Failed, match=r"pkg==1\.0 could not be fetched"):
        fetch(source.model_copy(update={"sha256": "1" * 64}))
    assert not list((tmp_path / "cache" / "downloads" / ("1" * 16)).iterdir())


def test_a_local_data_set_is_read_row_by_row(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from cusprun.corpora.sources.hub import read_hub

    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"q": f"Question {n}?", "a": f"Answer {n}."} for n in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"question": "q", "answer": "a"}
    source = HubSource(kind="datasets", package=str(folder), version="main", columns=columns, rows=3)
    drafts = list(read_hub(source))
    assert [draft.text for draft in drafts] == [f"Question {n}?\n\nAnswer {n}." for n in range(3)]
    long = [{"text": f"Article {n} says. " * 1000} for n in range(2)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, long)))
    drafts = list(read_hub(HubSource(kind="datasets", package=str(folder), version="main", rows=2)))
    assert len(drafts) > 4  # pieces of one row share a side
    assert {draft.group for draft in drafts} == {"0", "1"}
    assert all(f"Article {draft.group}" in draft.text for draft in drafts)
    with pytest.raises(Failed, match="could not be read"):
        list(read_hub(source.model_copy(update={"package": str(tmp_path / "none")})))


def test_own_text_serves_a_language_that_the_catalog_lacks(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"Wie betaalt de huur van kamer {n}?",
            "choices": [f"De huurder {n}", f"De eigenaar {n}"],
            "answer": 0,
        }
        for n in range(80)
    ]
    path, style = tmp_path / "huur.jsonl", tmp_path / "stijl.txt"
    path.write_text("\n".join(map(json.dumps, rows)))
    style.write_text("\n\n".join(f"Geachte heer {n}, " + f"brief {n} " * 300 for n in range(40)))
    scenario, own = Scenario("nl"), [OwnText(path, 2.0)]
    corpora = dimension_corpora(scenario, own, {"style": style})
    assert set(corpora) == {"language", "style"}
    assert {item.weight for item in corpora["language"]} == {2.0}
    held = evaluation_texts(scenario, own, {"style": style})
    asked = questions(scenario, own)
    assert asked
    assert {document.entry for document in held["scenario"]} == {"file:huur.jsonl"}
    calibrated = {item.document.id for group in corpora.values() for item in group}
    assert not calibrated & {document.id for group in held.values() for document in group}
    assert not {item.document.question.prompt for item in corpora["language"]} & {q.question.prompt for q in asked}


def long_texts(folder: Path, count: int) -> Path:
    """Texts of about 12,000 characters, no two alike, a file each."""
    folder.mkdir()
    for n in range(count):
        paragraphs = [f"{n} {k} " + " ".join(f"w{n}x{k}y{word}" for word in range(60)) for k in range(24)]
        (folder / f"{n:02}.txt").write_text("\n\n".join(paragraphs))
    return folder


def test_parts_of_an_own_text_are_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = long_texts(tmp_path / "contracts", 20)
    rows = tmp_path / "contracts.jsonl"
    rows.write_text("\n".join(json.dumps({"text": path.read_text()}) for path in sorted(folder.iterdir())))
    for path in (folder, rows):
        shelf = open_own(path, "file:own", Scenario())
        sides: dict[str, set[str]] = {}
        for document, side in zip(shelf.documents, shelf.sides, strict=True):
            sides.setdefault(document.text.split("x")[0].split("w")[1], set()).add(side)
        assert len(shelf.documents) >= 3 * len(sides) == 60
        assert all(len(found) == 1 for found in sides.values())
        assert {side for found in sides.values() for side in found} == {"calibration", "held-out"}
    assert capsys.readouterr().err == ""


def test_one_long_text_alone_is_cut_and_that_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = long_texts(tmp_path / "one", 1).iterdir()
    path = tmp_path / "only.txt"
    path.write_text("\n\n".join(source.read_text().replace("w0x", f"v{k}x") for k in range(8)))
    for _ in range(2):
        shelf = open_own(path, "file:only.txt", Scenario())
    assert {"calibration", "held-out"} <= set(shelf.sides)
    assert capsys.readouterr().err.count("only.txt: too few texts to hold whole ones out") == 1


def test_own_text_with_nothing_left_to_calibrate_is_refused(tmp_path: Path) -> None:
    shelves = []
    for number in range(40):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"Only one short document, number {number}.")
        try:
            dimension_corpora(Scenario("nl"), [OwnText(path)])
        except InvalidRequest as error:
            shelves.append(str(error))
    assert shelves
    assert all("give more text" in message for message in shelves)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.txt").write_text("text")
    with pytest.raises(InvalidRequest, match="rename one"):
        dimension_corpora(Scenario("nl"), [OwnText(tmp_path / "a/own.txt"), OwnText(tmp_path / "b/own.txt")])
