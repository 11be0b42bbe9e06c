"""The studies: cells that prune takes, an interrupted study that goes on, pages that say what is there and what not."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cusprun.benchmarks.peers import (
    dimensions,
    epsilon,
    forms,
    instruct,
    methods,
    specialised,
    stability,
    tokens,
    widths,
)
from cusprun.benchmarks.peers.grid import SAME_ORDER, Cell, Grid, Setup, flags_as_words, read_records
from cusprun.benchmarks.peers.scenes import EN_LEGAL_QA, MADE, Scene, made_scene, own_scene
from cusprun.benchmarks.peers.study import Study, Telling, chosen, parse, run_study
from cusprun.benchmarks.peers.study_page import ASIDE, Row, as_row, write_pages
from cusprun.benchmarks.tally import percent
from cusprun.flags import PRUNING
from cusprun.recipe import make_recipe
from cusprun.stages import VERSIONS

STUDIES = [
    module.STUDY for module in (methods, widths, forms, specialised, dimensions, epsilon, tokens, instruct, stability)
]
SMALL = ["--tokens", "2048", "--window", "64", "--eval-tokens", "1024", "--questions", "0", "--flag", "align=8",
         "general=0"]  # fmt: skip


def named(study: Study) -> str:
    return study.name


def figures(cell: Cell, bits: float, accuracy: float | None = None) -> dict[str, Any]:
    """A result of a cell whose bits per byte are ``bits`` where the dense model has 1."""
    measured = {"bits_per_byte": bits, "dense": 1.0, "accuracy": 0.3, "dense_accuracy": 0.4, "tokens": 4096}
    texts = {text: measured for text in ("scenario", "domain", "general")}
    asked = {"accuracy": accuracy, "dense": {"accuracy": 0.5, "interval": [0.4, 0.6]}}
    return {
        "expert": {"parameters": 100_000_000, "vocabulary": 49152}, "removed_share": 0.25, "seconds": 12.0,
        "dense": {"parameters": 134_000_000, "vocabulary": 49152},
        "calibration": [{"text": "domain", "entry": "a", "documents": 3, "tokens_of_text": 4096}] * 2,
        "texts": texts, "aside": measured, "questions": asked if accuracy is not None else None,
        "stability": {"calibration": {**measured, "bits_per_byte": 1.01}, ASIDE: measured, **texts},
    }  # fmt: skip


def rows_of(study: Study) -> list[Row]:
    cells = study.cells(study.scenes, 65536)
    return [as_row(cell, figures(cell, 1.05 + 0.01 * number)) for number, cell in enumerate(cells)]


# cells ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES, ids=named)
def test_every_cell_is_a_command_that_prune_takes(study: Study) -> None:
    cells = study.cells(study.scenes, 65536)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for cell in cells:
        scene = cell.calibration or cell.scene
        flags = {"tokens": 65536, "window": 512, **scene.flags(), **cell.settings}
        assert set(flags) <= set(PRUNING)
        make_recipe({"model": "m", **flags})
        assert {*study.groups, *study.columns} <= set(cell.labels)
        assert cell.vocab_of is None or cell.vocab_of in names
        assert scene.made is None or scene.made in MADE


def test_the_studies_hold_what_was_promised() -> None:
    cells = methods.STUDY.cells(methods.STUDY.scenes, 65536)
    assert len(cells) == 9 * 4 * 3 * 2
    trimmed = [cell for cell in cells if "/trimmed/0.5/" in cell.name and cell.scene == EN_LEGAL_QA]
    assert {cell.vocab_of for cell in trimmed if cell.labels["method"] != "refit"} == {"en-legal-qa/trimmed/0.5/refit"}
    assert {cell.labels["tokens"] for cell in tokens.cells([EN_LEGAL_QA], 0)} == {2**power for power in range(12, 19)}
    found = {cell.labels["dimensions"] for cell in dimensions.cells([EN_LEGAL_QA], 0)}
    assert found == {"L", "D", "T", "LD", "LDT", dimensions.CONTROL}
    assert {cell.scene for cell in dimensions.cells([EN_LEGAL_QA], 0)} == {EN_LEGAL_QA}


def test_filters() -> None:
    study = methods.STUDY
    cells = study.cells(study.scenes, 65536)

    def passing(*arguments: str) -> set[str]:
        options = parse(study, arguments)
        return {cell.name for cell in cells if chosen(cell, options)}

    assert passing() == {cell.name for cell in cells}
    assert passing("--scenario", "en-legal-qa", "--ratio", "0.25", "0.5", "--method", "flap", "--only", "*/kept/*") == {
        "en-legal-qa/kept/0.25/flap", "en-legal-qa/kept/0.5/flap"
    }  # fmt: skip


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study(methods.STUDY, ["--scenario", "en-cooking"]) == 2
    assert "write one of en-legal-qa, en-science-summarization, de-software-qa" in capsys.readouterr().err
    assert run_study(methods.STUDY, ["--only", "nothing"]) == 2
    assert "--list shows all 216" in capsys.readouterr().err
    assert run_study(methods.STUDY, ["--flag", "align"]) == 2
    assert "write NAME=VALUE" in capsys.readouterr().err


def test_listing_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study(widths.STUDY, ["--list", "--ratio", "0.5", "--scenario", "en-legal-qa"]) == 0
    shown = capsys.readouterr().out.split()
    assert shown == [f"en-legal-qa/0.5/{name}" for name in ("measured", "even", "scores", "measured-one-width")]


def test_words_of_the_command_line() -> None:
    flags = {"lang": "en", "corpus": ("/a/b.jsonl", "/a/c.txt"), "eval_tokens": 5}
    assert flags_as_words(flags) == [
        "--lang", "en", "--corpus", "/a/b.jsonl", "--corpus", "/a/c.txt", "--eval-tokens", "5"
    ]  # fmt: skip
    assert flags_as_words(flags, names_only=True)[3] == "b.jsonl"


# a study run, interrupted and gone on with ----------------------------------------------------------------------------


def command(work: Path, model: Path, text: Path, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "cusprun.benchmarks.peers.methods", "--model", str(model), "--corpus", str(text),
        "--work", str(work / "work"), "--out", str(work / "results" / "methods"), *SMALL, *arguments,
    ]  # fmt: skip


def test_an_interrupted_study_goes_on(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    wanted = ["--only", "*/kept/0.25/magnitude", "*/trimmed/0.25/random"]
    process = subprocess.Popen(command(tmp_path, pico_model, own_text, *wanted), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("cell 2/3"):
            break
    process.send_signal(signal.SIGTERM)
    assert "goes on with the next cell" in process.stderr.read()
    assert process.wait(60) == 130
    out = tmp_path / "results"
    page = (out / "methods.md").read_text(encoding="utf-8")
    assert "Not run yet, 71 of 72 cells" in page
    assert "| magnitude |" in page

    done = subprocess.run(command(tmp_path, pico_model, own_text, *wanted), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "cell 1/3 contracts/kept/0.25/magnitude: done before, kept" in done.stderr
    assert "text: done before, kept" in done.stderr  # cells of one scenario share their stages
    found = json.loads((out / "methods.json").read_text(encoding="utf-8"))
    cells = {cell["name"]: cell for cell in found["cells"]}
    # the rival's number of tokens is that of refit, which was run for it unasked
    assert set(cells) == {f"contracts/{name}" for name in (
        "kept/0.25/magnitude", "trimmed/0.25/refit", "trimmed/0.25/random"
    )}  # fmt: skip
    vocabulary = cells["contracts/trimmed/0.25/refit"]["expert"]["vocabulary"]
    given = cells["contracts/trimmed/0.25/random"]["flags"]
    assert given[given.index("--vocab") + 1] == str(vocabulary)
    for cell in cells.values():
        assert cell["removed_share"] == pytest.approx(0.25, abs=0.02)
        assert set(cell["texts"]) == {"scenario", "general"}
        assert all(text["dense"] > 0 for text in cell["texts"].values())
        assert all(0 < text["increase_stderr"] < 1 for text in cell["texts"].values())
        assert {"text", "plan", "model"} & set(cell["stages"])
        assert sum(cell["stages"].values()) == pytest.approx(cell["seconds"], abs=0.02)
    assert len(found["not_run"]) == 69
    assert str(tmp_path) not in json.dumps(found)
    assert (out / "methods.png").read_bytes().startswith(b"\x89PNG")
    with (out / "methods.csv").open(encoding="utf-8") as file:
        assert {row["cell"] for row in csv.DictReader(file)} == set(cells)
    page = (out / "methods.md").read_text(encoding="utf-8")
    assert "`python -m cusprun.benchmarks.peers.methods --model pico-llama --corpus contracts.txt" in page
    assert "| dense |" in page
    for cell in cells.values():
        text = cell["texts"]["scenario"]
        assert percent(text["bits_per_byte"] / text["dense"] - 1, text["increase_stderr"]) in page

    # a machine without the cells finds them in the page's JSON, under the same texts and versions
    elsewhere = command(tmp_path, pico_model, own_text, *wanted)
    elsewhere[elsewhere.index("--work") + 1] = str(tmp_path / "elsewhere")
    seeded = subprocess.run(elsewhere, capture_output=True, text=True, timeout=600)
    assert seeded.returncode == 0, seeded.stderr
    assert seeded.stderr.count("done before, kept") == 3
    assert not (tmp_path / "elsewhere" / "experts").exists()
    assert json.loads((out / "methods.json").read_text(encoding="utf-8"))["cells"] == found["cells"]

    # one whose number of tokens is not known is not shown, and its record is there once it is known again
    source = {cell["name"]: cell for cell in found["cells"]}["contracts/trimmed/0.25/refit"]
    found["cells"].remove(source)
    (out / "methods.json").write_text(json.dumps(found), encoding="utf-8")
    alone = command(tmp_path, pico_model, own_text, "--only", "*/kept/0.25/magnitude")
    alone[alone.index("--work") + 1] = str(tmp_path / "third")
    assert subprocess.run(alone, capture_output=True, text=True, timeout=600).returncode == 0
    rest = json.loads((out / "methods.json").read_text(encoding="utf-8"))
    assert [cell["name"] for cell in rest["cells"]] == ["contracts/kept/0.25/magnitude"]
    assert [record["name"] for record in rest["waiting"]] == ["contracts/trimmed/0.25/random"]
    smaller = [*alone, "--tokens", "1024", "--work", str(tmp_path / "third"), "--out", str(out / "smaller")]
    assert subprocess.run(smaller, capture_output=True, text=True, timeout=600).returncode == 0
    assert "waiting" not in json.loads((out / "smaller.json").read_text(encoding="utf-8"))
    (out / "smaller.json").unlink()
    rest["cells"].append(source)
    (out / "methods.json").write_text(json.dumps(rest), encoding="utf-8")
    alone[alone.index("--work") + 1] = str(tmp_path / "fourth")
    assert subprocess.run(alone, capture_output=True, text=True, timeout=600).returncode == 0
    rest = json.loads((out / "methods.json").read_text(encoding="utf-8"))
    assert {cell["name"] for cell in rest["cells"]} == set(cells)
    assert "waiting" not in rest

    # a cell that cannot be is named with its reason, and the others are shown
    failed = subprocess.run(
        command(tmp_path, pico_model, own_text, "--only", "*/kept/0.5/random", "--flag", "align=128", "general=0"),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "did not come out" in failed.stderr
    assert "`contracts/kept/0.5/random` did not come out: " in (out / "methods.md").read_text(encoding="utf-8")


def test_the_form_of_refit_is_in_no_other_method_s_key(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    scene = own_scene(own_text)
    cells = [
        Cell(f"{method}/{form}", scene, {"method": method, "ratio": 0.25, "form": form}, {})
        for method in ("refit", "magnitude")
        for form in ("joint", "sequential")
    ]
    grid = Grid(Setup(str(pico_model), tmp_path, 2048, 64, 1024, 0), cells, [scene])
    grid.write_texts(scene)
    keys = [grid.key(cell) for cell in cells]
    assert None not in keys
    assert keys[0] != keys[1]
    assert keys[2] == keys[3]


def test_the_rate_of_a_recovery_that_is_not_asked_for_is_in_no_key(
    tmp_path: Path, pico_model: Path, own_text: Path
) -> None:
    scene = own_scene(own_text)
    asked = [{}, {"recover_rate": 0.5}, {"recover": "lora"}, {"recover": "lora", "recover_rate": 0.5}]
    cells = [Cell(str(number), scene, {"ratio": 0.25, **flags}, {}) for number, flags in enumerate(asked)]
    grid = Grid(Setup(str(pico_model), tmp_path, 2048, 64, 1024, 0), cells, [scene])
    grid.write_texts(scene)
    keys = [grid.key(cell) for cell in cells]
    assert None not in keys
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_how_rows_are_chosen_is_in_the_key_of_those_that_choose_them(
    tmp_path: Path, pico_model: Path, own_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = own_scene(own_text)
    cells = [Cell(vocab, scene, {"ratio": 0.25, "vocab": vocab}, {}) for vocab in ("auto", "keep", "512")]
    grid = Grid(Setup(str(pico_model), tmp_path, 2048, 64, 1024, 0), cells, [scene])
    grid.write_texts(scene)
    changed, order = [], max(*SAME_ORDER, VERSIONS["prices"]) + 1
    monkeypatch.setitem(VERSIONS, "prices", order)
    monkeypatch.setitem(SAME_ORDER, order + 1, order)  # one version later the tokens go in the same order
    before = [grid.key(cell) for cell in cells]
    for version in (order + 1, order + 2):
        monkeypatch.setitem(VERSIONS, "prices", version)
        changed.append([grid.key(cell) != key for cell, key in zip(cells, before, strict=True)])
    assert changed == [[True, False, False], [True, False, True]]


# pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES, ids=named)
def test_pages_of_a_whole_study(study: Study, tmp_path: Path) -> None:
    rows = rows_of(study)
    telling = Telling(study, parse(study, []), [row.name for row in rows])
    dense = {scene.name: {"scenario": 1.0, "domain": 1.0, "general": 1.0} for scene in study.scenes}
    write_pages(tmp_path / study.name, telling, rows, {}, dense, {}, [])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md", ".png"}
    page = (tmp_path / f"{study.name}.md").read_text(encoding="utf-8")
    assert f"`python -m cusprun.benchmarks.peers.{study.name}`" in page
    assert f"All {len(rows)} cells of the study were run." in page
    assert "+5.0 %" in page
    assert "1.000 bits" in page
    assert [line for line in page.splitlines() if line.startswith("- ")]
    assert sum(line.endswith(" | 12 |") for line in page.splitlines()) == len(rows)  # the seconds, last in a row


def test_the_page_names_every_processor(tmp_path: Path) -> None:
    study = forms.STUDY
    cells = study.cells(study.scenes, 65536)[:2]

    def told(*processors: str) -> str:
        rows = [
            as_row(cell, {**figures(cell, 1.1), "environment": {"cpu": cpu}})
            for cell, cpu in zip(cells, processors, strict=True)
        ]
        telling = Telling(study, parse(study, []), [])
        write_pages(tmp_path / "page", telling, rows, {}, {}, {}, [])
        return (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()[-1]

    assert told("one", "one").startswith("one; Python")
    assert told("two", "one").startswith("Measured on one and two, so that seconds do not compare; Python")


def test_other_files_beside_the_results_hold_no_record(tmp_path: Path) -> None:
    for name, text in {
        "a": "{",
        "b": '{"cells": null}',
        "c": '[{"key": 1}]',
        "d": '{"cells": [3, {"key": 1}]}',
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "e.json").write_bytes(b"\xff\xfe")
    assert read_records(tmp_path) == []


def test_a_record_whose_text_is_not_to_be_had_stops_nothing(
    tmp_path: Path, pico_model: Path, own_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = Cell("lost", Scene("lost", corpus=(str(tmp_path / "gone.txt"),)), {"method": "magnitude", "ratio": 0.25}, {})
    there = Cell("there", own_scene(own_text), {"method": "magnitude", "ratio": 0.25}, {})
    record = {"key": "0" * 64, "cell": "lost", "texts": {}, "expert": {}}
    (tmp_path / "study.json").write_text(json.dumps({"cells": [record]}))
    setup = Setup(str(pico_model), tmp_path / "work", 2048, 64, 1024, 0, {"general": 0, "align": 8})
    grid = Grid(setup, [lost, there], [lost.scene, there.scene], records=tmp_path)
    grid.run(["there"], lambda: None)
    assert grid.result(there) is not None
    assert "the record of lost cannot be used" in capsys.readouterr().err


def test_half_of_the_best_rival() -> None:
    def said(refit: float, flap: float, ratio: float = 0.25) -> str:
        increase = {"refit": refit, "flap": flap, "random": 3.0}
        cells = [
            cell for cell in methods.cells([EN_LEGAL_QA], 0)
            if "/kept/" in cell.name and cell.labels["ratio"] == ratio and cell.labels["method"] in increase
        ]  # fmt: skip
        rows = [as_row(cell, figures(cell, 1 + increase[cell.labels["method"]])) for cell in cells]
        return "\n".join(methods.sentences(rows))

    met = said(0.05, 0.12)
    assert "refit adds +5.0 % in the scenario, the best rival, flap, +12.0 % (6 rivals not run yet): 0.42 of it;" in met
    assert "at most half of it: met" in met
    assert "0.58 of it; at most half of it: not met" in said(0.07, 0.12)
    assert "half" not in said(0.07, 0.12, 0.33)
    assert "promised at most 6 % on the text *scenario*, is +5.0 %: met" in said(0.05, 0.12)
    assert "is +7.0 %: not met" in said(0.07, 0.12)


def test_multiple_choice_beside_the_interval_of_dense() -> None:
    cell = next(cell for cell in methods.cells([EN_LEGAL_QA], 0) if cell.name == "en-legal-qa/kept/0.25/refit")
    assert "within it: met" in "\n".join(methods.sentences([as_row(cell, figures(cell, 1.05, accuracy=0.45))]))
    assert "within it: not met" in "\n".join(methods.sentences([as_row(cell, figures(cell, 1.05, accuracy=0.35))]))


def test_equal_widths_and_forms() -> None:
    cells = [cell for cell in widths.cells([EN_LEGAL_QA], 0) if cell.labels["ratio"] == 0.25]
    rows = [as_row(cell, figures(cell, 1.08 if cell.labels["widths"] == "measured" else 1.10)) for cell in cells]
    assert "20 % less; at least 15 % less: met" in "\n".join(widths.sentences(rows))
    cells = forms.cells([EN_LEGAL_QA], 65536)
    bits = {"joint": 1.07, "sequential": 1.09, "parallel": 1.08}
    said = "\n".join(forms.sentences([as_row(cell, figures(cell, bits[cell.labels["form"]])) for cell in cells]))
    assert "set aside joint +7.0 %, sequential +9.0 %; never worse than sequential: met" in said
    assert "set aside joint +7.0 %, parallel +8.0 %; never worse than parallel: met" in said
    assert "set aside sequential +9.0 %, parallel +8.0 %; never worse than parallel: not met" in said


def test_text_that_was_too_short_is_said() -> None:
    rows = [as_row(cell, figures(cell, 1.1)) for cell in tokens.cells([EN_LEGAL_QA], 0)]
    assert "en-legal-qa/262144-512/refit got 4,096 of 262,144 tokens" in tokens.sentences(rows)[-1]


def test_instability() -> None:
    assert stability.instability({"accuracy": 0.3, "dense_accuracy": 0.4}) == pytest.approx(0.25)
    assert stability.instability({"accuracy": 0.0, "dense_accuracy": 0.0}) is None


# scenes ---------------------------------------------------------------------------------------------------------------


def test_own_text_has_no_company(own_text: Path) -> None:
    windows = own_scene(own_text).selection(64).corpora
    assert list(windows) == ["domain"]
    assert {item.document.entry for item in windows["domain"]} == {"file:contracts.txt"}


@pytest.mark.slow
def test_the_styles_show_the_same_documents(tmp_path: Path) -> None:
    rows = {kind: MADE[kind](EN_LEGAL_QA) for kind in ("plain", "conversations", "questions")}
    assert len({len(found) for found in rows.values()}) == 1
    assert len(rows["plain"]) > 200
    for plain, talk, asked in zip(*rows.values(), strict=True):
        turns = [turn["content"] for turn in talk["messages"]]
        assert talk["messages"][-1]["role"] == "assistant"
        assert plain["text"] == "\n\n".join(turn for turn in turns if turn)
        assert asked["messages"] == talk["messages"][:-1]
    assert made_scene("plain", EN_LEGAL_QA).flags() == {"domain": "only-plain"}


def test_options_of_a_study_of_its_own() -> None:
    options: argparse.Namespace = parse(stability.STUDY, ["--resamples", "3", "--layers", "1", "2"])
    assert (options.resamples, options.layers) == (3, [1, 2])
