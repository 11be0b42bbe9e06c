"""The harness's adapter against the harness's own Hugging Face model, on the same requests and the same task files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cusprun.benchmarks.harness import evaluate_tasks, parse_tasks
from cusprun.cli import app
from cusprun.dense import DEFAULT_MODEL, find_dense
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.onnx import export_onnx
from tests import pico
from tests.benchmarks.conftest import UNICODE

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima", "Cuba": "Havana"}
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
{more}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def onnx(folder: Path) -> Path:
    out = folder.parent / "harness-fp32"
    export_onnx(folder, out, "fp32")
    return out


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], output: str, target: str, more: str) -> Path:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, output=output, target=target, more=more), encoding="utf-8")
    return path


def choice_task(folder: Path, name: str, items: int) -> Path:
    """Three choices each after a short prompt that ends in a blank now and then."""
    chance = random.Random(0)
    rows = []
    for _ in range(items):
        country = chance.choice(list(CAPITALS))
        choices = [*chance.sample([city for city in CAPITALS.values() if city != CAPITALS[country]], 2)]
        choices.insert(chance.randrange(3), CAPITALS[country])
        opening = chance.choice(["Most people in", "Trains from", "Someone at home in", "Rain falls on"])
        prompt = f"{opening} {country} go to{chance.choice(['', '', ' '])}"
        rows.append({"prompt": prompt, "choices": choices, "answer": choices.index(CAPITALS[country])})
    more = "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    return write_task(folder, name, rows, "multiple_choice", "answer", more)


def by_transformers(model: Path, task: Path, **settings: Any) -> dict[str, Any]:
    """The row of the harness with its own model in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(str(model), device="cpu", dtype="float32", batch_size=16)
    found = simple_evaluate(
        lm, tasks=[str(task)], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **settings
    )
    return {"row": found["results"][task.stem], "samples": found["samples"][task.stem]}


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.mark.usefixtures("answers")
def test_every_request_is_answered_as_by_the_harness_s_own_model(folder: Path, gguf: Path, onnx: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from cusprun.benchmarks.harness_model import ArtifactLM

    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    pairs = [(sentence, f" {word}") for sentence in pico.SENTENCES[:3] for word in ("pays", "le tribunal", "ü")]
    pairs += [
        ("", "The tenant"),
        ("The tenant ", "shall"),
        ("<|im_start|>user\nHi", " there"),
        ("tenant " * 600, "x y"),
    ]
    texts = [("short",), (UNICODE * 12,), ("",)]  # the second is several windows long
    prompts = [
        (pico.SENTENCES[0], {"until": ["\n\n"], "max_gen_toks": 12}),
        (pico.SENTENCES[1], {"until": ["e"], "max_gen_toks": 24, "do_sample": False}),
        ("tenant " * 600, {"until": [], "max_new_tokens": 6}),
    ]
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    rolling = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    said = [theirs.generate_until(requests("generate_until", [prompt]), disable_tqdm=True)[0] for prompt in prompts]
    assert len({*said}) == 3
    assert any(greedy for _, greedy in expected) or not all(greedy for _, greedy in expected)
    for artifact in (folder, gguf, onnx):
        ours = ArtifactLM(artifact, threads=1)
        found = ours.loglikelihood(requests("loglikelihood", pairs))
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(rolling, rel=1e-3)
        assert ours.generate_until(requests("generate_until", prompts)) == said
        history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}]
        for turns, opened in ((history[:1], True), (history, False)):
            assert ours.apply_chat_template(turns, opened) == theirs.apply_chat_template(turns, opened)


@pytest.mark.usefixtures("answers")
def test_the_greedy_flag_is_true_where_the_model_would_say_it(folder: Path) -> None:
    from cusprun.benchmarks.harness_model import ArtifactLM

    model = ArtifactLM(folder, threads=1)
    (said,) = model.generate_until(requests("generate_until", [(pico.SENTENCES[2], {"max_gen_toks": 1, "until": []})]))
    ((_, greedy), (_, other)) = model.loglikelihood(
        requests("loglikelihood", [(pico.SENTENCES[2], said), (pico.SENTENCES[2], said + "q")])
    )
    assert (greedy, other) == (True, False)


@pytest.mark.usefixtures("answers")
def test_a_task_file_scores_as_with_transformers(folder: Path, other: Path, gguf: Path, tmp_path: Path) -> None:
    task = choice_task(tmp_path, "capitals", 60)
    theirs = by_transformers(folder, task)
    found = evaluate_tasks(gguf, [str(task)], against=other, threads=1)["capitals"]
    assert found.n == 60
    for metric in ("acc", "acc_norm"):
        assert found.metrics[metric].artifact.value == pytest.approx(theirs["row"][f"{metric},none"])
        gap = found.metrics[metric].difference
        assert gap is not None
        assert gap.test == "McNemar, exact"
    targets = [sample["target"] for sample in theirs["samples"]]
    assert found.metrics["acc"].chance == pytest.approx(1 / 3)
    assert found.metrics["acc"].constant == pytest.approx(max(targets.count(n) for n in range(3)) / 60)
    other_row = by_transformers(other, task)["row"]
    against = found.metrics["acc"].against
    assert against is not None
    assert against.value == pytest.approx(other_row["acc,none"])


@pytest.mark.usefixtures("answers")
def test_generated_and_rolling_tasks_with_limit_and_template(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": sentence, "target": "the"} for sentence in pico.SENTENCES]
    more = (
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 8\n"
    )
    say = write_task(tmp_path, "say", rows, "generate_until", "target", more)
    found = evaluate_tasks(folder, [str(say)], limit=3, apply_chat_template=True, threads=1)["say"]
    assert found.n == 3
    assert found.metrics["exact_match"].chance is None
    more = "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n"
    text = write_task(tmp_path, "text", rows, "loglikelihood_rolling", '"{{prompt}}"', more)
    value = evaluate_tasks(folder, [str(text)], threads=1)["text"].metrics["bits_per_byte"]
    assert value.artifact.value == pytest.approx(by_transformers(folder, text)["row"]["bits_per_byte,none"], rel=1e-3)


@pytest.mark.usefixtures("answers")
def test_the_command_repeats_for_nothing(folder: Path, tmp_path: Path) -> None:
    task = choice_task(tmp_path, "capitals", 6)
    arguments = ["eval", str(folder), "--tasks", str(task), "--threads", "1"]
    first = CliRunner().invoke(app, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    assert "answers: pico" in first.stderr
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "answers: pico" not in again.stderr
    assert list(json.loads(again.stdout)) == ["tasks"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "capitals, 6" in shown
    assert "acc_norm" in shown


def test_what_cannot_be_run_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"(?s)one\.yaml: there is no such file.*two\.yaml"):
        parse_tasks("one.yaml,hellaswag,two.yaml")
    with pytest.raises(InvalidRequest, match="write the name of a task"):
        parse_tasks(" , ")
    with pytest.raises(InvalidRequest, match="--limit 0: write 1 or more"):
        evaluate_tasks(folder, ["x"], limit=0)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="the harness does not take it"):
        evaluate_tasks(folder, [str(broken)])
    unsafe = choice_task(tmp_path, "unsafe", 2)
    unsafe.write_text(unsafe.read_text() + "unsafe_code: true\n", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="runs what a model wrote"):
        evaluate_tasks(folder, [str(unsafe)])
    gone = choice_task(tmp_path, "gone", 2)
    gone.with_suffix(".jsonl").unlink()
    with pytest.raises(Failed, match="the data of a task cannot be read"):
        evaluate_tasks(folder, [str(gone)], threads=1)
    with pytest.raises(InvalidRequest, match=r"no such task; near it: hellaswag[^_]"):
        evaluate_tasks(folder, ["hellaswagg"])


def test_without_the_package_one_message_says_which_extra() -> None:
    """Python told to find no lm_eval, as where the extra is not installed."""
    code = "import sys; sys.modules['lm_eval'] = None; from cusprun.cli import main; sys.argv[1:] = {!r}; main()"
    arguments = ["eval", "anything", "--tasks", "hellaswag"]
    done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--tasks needs the package lm-eval: pip install 'cusprun[eval]'")


@pytest.mark.slow
def test_the_real_model_scores_as_with_transformers_on_200_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = find_dense(DEFAULT_MODEL).folder
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    task = choice_task(tmp_path, "capitals", 200)
    theirs = by_transformers(dense, task)["row"]
    found = evaluate_tasks(dense, [str(task)])["capitals"].metrics
    assert found["acc"].artifact.value == pytest.approx(theirs["acc,none"], abs=1e-12)
    assert found["acc_norm"].artifact.value == pytest.approx(theirs["acc_norm,none"], abs=1e-12)
    assert found["acc"].artifact.value > (found["acc"].constant or 1)
