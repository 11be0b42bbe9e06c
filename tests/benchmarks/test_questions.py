"""Items put to tiny models in every runtime, against plain transformers; answers that are kept."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cusprun.benchmarks.answer_store import AnswerStore, answer_keys, artifact_sha256, store_path
from cusprun.benchmarks.answers import ask
from cusprun.benchmarks.questions import constant_answers, evaluate_items, lead, request, score_kind
from cusprun.benchmarks.tasks import multiple_choice
from cusprun.cli import app
from cusprun.corpora.document import Question
from cusprun.corpora.items import Item
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import GgufExport
from cusprun.exporters.onnx import export_onnx
from tests import pico

NEW = 8
CHOICES = ("The tenant pays.", "Le tribunal tranche.", "Nobody.")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def onnx(folder: Path) -> Path:
    out = folder.parent / "pico-fp32"
    export_onnx(folder, out, "fp32")
    return out


def replies(folder: Path, prompts: tuple[str, ...]) -> list[str]:
    """What the model says after the chat prompt: transformers' own greedy generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_replies_are_transformers_greedy_ones_in_every_runtime(folder: Path, gguf: Path, onnx: Path) -> None:
    said = replies(folder, pico.SENTENCES)
    assert len(set(said)) > 2
    items = [Item("qa", prompt, references=(reply,)) for prompt, reply in zip(pico.SENTENCES, said, strict=True)]
    items[1] = Item("qa", pico.SENTENCES[1], references=("certainly not this",))
    for artifact in (folder, gguf, onnx):
        found = evaluate_items(artifact, items, max_new_tokens=NEW, threads=1)["qa"]
        assert found.metrics["exact_match"].artifact.value == pytest.approx(5 / 6)
        assert found.metrics["f1"].artifact.value >= 5 / 6
        assert found.metrics["f1"].chance is None


def test_choices_are_those_of_multiple_choice(folder: Path, other: Path) -> None:
    questions = [Question(sentence, CHOICES, index % 3) for index, sentence in enumerate(pico.SENTENCES)]
    items = [Item("choice", question.prompt, question.choices, question.answer) for question in questions]
    found = evaluate_items(folder, items, against=other, threads=1)["choice"]
    expected = multiple_choice(folder, questions, threads=1)
    assert found.metrics["accuracy"].artifact.value == expected.accuracy
    assert found.metrics["accuracy_normalised"].artifact.value == expected.accuracy_normalised
    assert found.metrics["accuracy"].constant == expected.constant_answer_accuracy
    assert found.metrics["accuracy"].chance == pytest.approx(expected.chance)
    gap = found.metrics["accuracy"].difference
    assert gap is not None
    assert gap.value == pytest.approx(expected.accuracy - multiple_choice(other, questions, threads=1).accuracy)


def test_every_kind_has_its_scores_beside_what_needs_no_model() -> None:
    labels = ("yes", "no", "perhaps")
    classes = [Item("classification", "p", labels, answer) for answer in (0, 0, 0, 1)]
    found = score_kind("classification", classes, [[-1.0, -2.0, -3.0]] * 3 + [[-9.0, -2.0, -1.0]], None).metrics
    assert found["accuracy"].artifact.value == 0.75
    assert found["macro_f1"].artifact.value == pytest.approx(1 / 3)  # F1 of yes 1, of no and perhaps 0
    assert found["accuracy"].constant == 0.75
    assert found["macro_f1"].constant == pytest.approx((6 / 7 + 0) / 2)
    assert found["accuracy"].chance == pytest.approx(1 / 3)
    assert 0.15 < (found["macro_f1"].chance or 0) < 0.33
    long = "One sentence. Two! Three? Four."
    sums = [Item("summarization", "p", references=("One sentence two three",), source=long)]
    assert constant_answers("summarization", sums) == [lead(long)] == ["One sentence. Two! Three?"]
    assert score_kind("summarization", sums, [""], None).metrics["rouge1"].artifact.value == 0
    assert score_kind("summarization", sums, [""], None).metrics["rouge1"].constant == 1
    copies = [Item("translation", "p", references=("Berlin",), source="Berlin")]
    assert score_kind("translation", copies, ["x"], None).metrics["chrf"].constant == 1
    asked = [Item("qa", "p", references=(answer,)) for answer in ("Yes.", "no", "yes")]
    assert score_kind("qa", asked, ["no"] * 3, None).metrics["exact_match"].constant == pytest.approx(2 / 3)


def test_the_right_answer_is_not_in_what_is_asked() -> None:
    one, other = (Item("qa", "Capital of Italy?", references=(answer,)) for answer in ("Rome", "Milan"))
    assert request(one, NEW) == request(other, NEW)
    assert "Rome" not in json.dumps(request(one, NEW))


def test_a_reply_ends_where_it_is_told_to(folder: Path) -> None:
    (whole,) = ask(folder, [request(Item("qa", pico.SENTENCES[0]), 24)], threads=1)
    end = whole[len(whole) // 2 :][:2]
    assert ask(folder, [request(Item("qa", pico.SENTENCES[0], until=(end,)), 24)], threads=1) == [
        whole.split(end)[0].strip()
    ]


def test_a_kept_answer_is_not_asked_again_but_when_fresh(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    requests = [request(Item("choice", sentence, CHOICES, 0), NEW) for sentence in pico.SENTENCES[:2]]
    first = ask(folder, requests, threads=1)
    assert "answers: pico" in capfd.readouterr().err
    assert ask(folder, requests, threads=1) == first
    assert capfd.readouterr().err == ""
    with AnswerStore(store_path()) as store:
        store.put(answer_keys(folder, requests, "cpu")[1], [1.0, 2.0, 3.0])
    assert ask(folder, requests, threads=1) == [first[0], [1.0, 2.0, 3.0]]
    assert ask(folder, requests, fresh=True, threads=1) == first


def test_another_artifact_or_setting_is_another_key(folder: Path, gguf: Path, tmp_path: Path) -> None:
    asked = [request(Item("qa", "p", references=("x",)), NEW)]
    keys = {*answer_keys(folder, asked, "cpu"), *answer_keys(gguf, asked, "cpu"), *answer_keys(gguf, asked, "cuda")}
    keys |= set(answer_keys(gguf, [request(Item("qa", "p", references=("x",)), NEW + 1)], "cpu"))
    copy = tmp_path / "renamed.gguf"
    shutil.copy(gguf, copy)
    assert len(keys) == 4
    assert answer_keys(copy, asked, "cpu") == answer_keys(gguf, asked, "cpu")
    with copy.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    assert answer_keys(copy, asked, "cpu") != answer_keys(gguf, asked, "cpu")


def test_a_split_file_is_hashed_in_all_its_parts(folder: Path, tmp_path: Path) -> None:
    report = GgufExport(folder, "f32").write(tmp_path / "split.gguf", split_max=200_000)
    first, last = report.parts[0], report.parts[-1]
    assert last != first
    before = artifact_sha256(first)
    with last.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80\x3f")
    assert artifact_sha256(first) != before


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    rows = [{"kind": "qa", "prompt": f"{index} {pico.SENTENCES[0]}", "answers": ["x"]} for index in range(400)]
    path = write(tmp_path / "items.jsonl", rows)
    arguments = ["eval", str(folder), "--questions", str(path), "--max-new-tokens", "40", "--threads", "1"]
    running = subprocess.Popen([sys.executable, "-m", "cusprun.cli", *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while kept() < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    asked = [request(Item("qa", row["prompt"], references=("x",)), 40) for row in rows]
    with AnswerStore(store_path()) as store:
        there = [store.get(key) is not None for key in answer_keys(folder, asked, "cpu")]
    assert 3 <= sum(there) == kept() < 400
    done = [row for row, held in zip(rows, there, strict=True) if held]
    write(path, [*done, rows[there.index(False)]])
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["questions"]["qa"]["n"] == len(done) + 1
    assert f"{len(done)} answers kept from before, 1 to be asked" in again.stderr


def kept() -> int:
    path = store_path()
    if not path.exists():
        return 0
    with sqlite3.connect(path, timeout=30) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE name = 'answers'").fetchall()
        count = database.execute("SELECT count(*) FROM answers").fetchone()[0] if tables else 0
    database.close()
    return int(count)


def test_what_cannot_be_asked_is_said_and_the_rest_is_kept(folder: Path, tmp_path: Path) -> None:
    asked = [request(Item("qa", prompt, references=("x",)), NEW) for prompt in ("A", "tenant " * 600)]
    with pytest.raises(InvalidRequest, match=r"do not fit pico's context of 512: .* lower --max-new-tokens"):
        ask(folder, asked, threads=1)
    assert kept() == 1
    with pytest.raises(InvalidRequest, match=r"(?s)--limit 0: write 1.*--max-new-tokens 0: write 1"):
        evaluate_items(folder, [Item("qa", "p", references=("x",))], limit=0, max_new_tokens=0)
    store_path().write_bytes(b"this is no database, and long enough to be seen as none" * 20)
    with pytest.raises(Failed, match=r"answers\.sqlite are damaged .*delete the file"):
        ask(folder, asked[:1], threads=1)


def test_the_command_answers_in_one_document_and_in_tables(folder: Path, other: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "choice", "prompt": sentence, "choices": CHOICES, "answer": 0} for sentence in pico.SENTENCES
    ]
    rows.append({"kind": "qa", "prompt": "Who pays?", "answers": ["the tenant"]})
    questions = write(tmp_path / "items.jsonl", rows)
    arguments = ["eval", str(folder), "--questions", str(questions), "--against", str(other), "--limit", "4"]
    arguments += ["--max-new-tokens", "4", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["questions"]
    assert [(kind, entry["n"]) for kind, entry in found.items()] == [("choice", 4), ("qa", 1)]
    metric = found["choice"]["metrics"]["accuracy"]
    assert set(metric) == {"artifact", "constant", "chance", "against", "difference"}
    assert metric["constant"] == 1
    shown = CliRunner().invoke(app, arguments).stdout
    assert "choice, 4" in shown
    assert "McNemar" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown


def test_nothing_to_measure_on_is_said(folder: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(folder)])
    assert done.exit_code == 2 or isinstance(done.exception, InvalidRequest)
    assert "--text FILE, --questions FILE or --tasks NAME" in str(done.exception) + done.output


def test_per_byte_scores_count_utf_8() -> None:
    items = [Item("choice", "p", ("ää", "aaa"), 0)]
    found = score_kind("choice", items, [[-3.0, -2.4]], None).metrics  # per byte -0.75 and -0.8
    assert (found["accuracy"].artifact.value, found["accuracy_normalised"].artifact.value) == (0, 1)
    assert np.isfinite(found["accuracy"].constant)
