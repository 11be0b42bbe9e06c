"""The shipped catalog is complete and honest; scenarios without text are refused with what there is."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

import cusprun.corpora
from cusprun.corpora.catalog import (
    DOMAINS,
    LANGUAGES,
    TASKS,
    Source,
    cell,
    check_scenario,
    find_entries,
    load_catalog,
    make_scenario,
)
from cusprun.corpora.document import Scenario
from cusprun.corpora.listing import list_entries
from cusprun.corpora.parsers import find_parser
from cusprun.corpora.sampling import all_entries, calibration_entries, evaluation_entries
from cusprun.corpora.sources.wheel import tag_options
from cusprun.errors import Failed, InvalidRequest


def test_every_entry_names_a_parser_and_looked_up_facts() -> None:
    for entry in load_catalog():
        assert entry.licence_note or entry.licence == "unknown", entry.name
        if isinstance(entry.source, Source):
            find_parser(entry.source.parser)
            assert entry.source.version in entry.source.file.replace("%2b", "+")


def test_every_value_of_every_dimension_has_text() -> None:
    for language in LANGUAGES:
        assert cell(Scenario(language=language)), language
        for domain in ("legal", "software", "general"):
            assert cell(Scenario(language, domain)), (language, domain)
    for domain in DOMAINS:
        assert cell(Scenario(domain=domain)), domain
    for task in TASKS:
        assert any(entry.task == task and not entry.reserve and entry.use != "named" for entry in load_catalog())


def test_unknown_licences_never_join_by_themselves() -> None:
    for language in (None, *LANGUAGES):
        for domain in (None, *DOMAINS):
            for task in (None, *TASKS):
                entries = all_entries(Scenario(language, domain, task))
                assert all(entry.licence != "unknown" and entry.use != "named" for entry in entries)


def test_an_unknown_licence_that_would_join_makes_the_catalog_invalid(tmp_path: Path) -> None:
    text = Path(cusprun.corpora.__file__).with_name("catalog.yaml").read_text()
    (tmp_path / "catalog.yaml").write_text(text.replace("licence: MIT", "licence: unknown", 1))
    with pytest.raises(Failed, match="unknown licence needs use: named"):
        load_catalog(tmp_path / "catalog.yaml")


def test_the_default_build_needs_only_wheels_and_little_of_them() -> None:
    sources = {entry.source.package: entry.source for entry in all_entries(Scenario("en", "legal", "qa"))}
    assert all(source.kind == "pypi" for source in sources.values())
    assert sum(source.bytes for source in sources.values() if isinstance(source, Source)) < 80e6


def test_reserved_entries_are_never_calibrated_on() -> None:
    for scenario in (Scenario("en", "legal", "qa"), Scenario("de", "software"), Scenario("en", "software"), Scenario()):
        assert not any(entry.reserve for entry in calibration_entries(scenario))
    found = evaluation_entries(Scenario("en", "legal", "qa"))
    assert set(found) == {"scenario", "domain", "general"}
    assert all(entry.reserve and entry.domain == "legal" for entry in found["domain"])


def test_a_scenario_is_put_into_the_catalogs_words() -> None:
    assert make_scenario("English", "Law", "QA") == Scenario("en", "legal", "qa")
    assert make_scenario("pt-BR", "code", None) == Scenario("pt", "software", None)
    assert make_scenario("", None, " ") == Scenario()
    assert str(Scenario("en", None, "qa")) == "en-qa"


@pytest.mark.parametrize(
    ("scenario", "hints"),
    [
        (Scenario("xx"), ["'xx'", "en, de, fr", "--corpus"]),
        (Scenario("en", "cooking", "poetry"), ["'cooking'", "'poetry'", "legal, medical", "qa, summarization"]),
        (Scenario("de", "medical"), ["de-medical", "en-medical", "de-software", "--corpus"]),
    ],
)
def test_a_cell_without_text_is_refused_with_what_there_is(scenario: Scenario, hints: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_scenario(scenario)
    assert all(hint in str(caught.value) for hint in hints), str(caught.value)
    check_scenario(scenario, own=True)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"no such corpus: nope\..*tort-law-qa"):
        find_entries(["tort-law-qa", "nope"])


def test_the_list_has_a_row_per_entry() -> None:
    rows = list_entries()
    assert len(rows) == len(load_catalog())
    assert {"default", "cell", "evaluation"} <= {row.use for row in rows}
    assert all(fnmatch.fnmatch(row.source, "*:*@*") for row in rows)


def test_a_pinned_platform_wheel_is_asked_for_on_any_machine() -> None:
    assert tag_options("evals-3.0.1.post1-py3-none-any.whl") == ["--ignore-requires-python"]
    options = tag_options("x-1.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl")
    assert options[options.index("--python-version") + 1] == "3.12"
    assert options.count("--platform") == 2
