"""The whole build on a tiny model: what it leaves, how it goes on, that it always ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from gguf import GGUFReader
from safetensors.numpy import load_file

from cusprun.allocation import plan_epsilon
from cusprun.anatomy import describe
from cusprun.checkpoint import Weights
from cusprun.compact import compact
from cusprun.files import sha256_file
from cusprun.importance import find_criterion
from cusprun.methods import bias_compensation, plan_method, score_layers
from cusprun.plan import LayerPlan, make_plan
from cusprun.runtimes.gguf_header import load_metadata
from cusprun.statistics import load_statistics
from tests import pico

SMALL = ["--tokens", "2048", "--window", "64", "--align", "8", "--quant", "f32"]
QUICK = [*SMALL, "--no-measure"]
MEASURED = [*SMALL, "--eval-tokens", "1024", "--repetitions", "2"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cusprun.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def artifacts(out: Path) -> dict[str, str]:
    """sha256 of everything that ships and does not hold times."""
    files = [*out.glob("gguf/*"), *out.glob("model/*"), out / "recipe.yaml"]
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(files)}


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory, pico_model: Path, own_text: Path) -> Path:
    """A measured expert of the tiny model, for a text of the user's own."""
    out = tmp_path_factory.mktemp("build") / "expert"
    done = run("build", "--model", pico_model, "--corpus", own_text, "--out", out, "--ratio", 0.3, "--json", *MEASURED)
    document = json.loads(done.stdout)  # one JSON document and nothing else
    assert document["folder"] == str(out)
    for line in ("model     ", "scenario  ", "text      ", "needs     "):
        assert line in done.stderr
    return out


def test_what_a_build_leaves(expert: Path) -> None:
    assert {path.name for path in expert.iterdir()} == {
        "recipe.yaml", "expert.json", "model", "gguf", "report", ".stages"
    }  # fmt: skip
    assert not [path for path in expert.rglob("*") if ".part" in path.name]
    recipe = yaml.safe_load((expert / "recipe.yaml").read_text())
    assert recipe["ratio"] == 0.3
    assert "out" not in recipe


ELSEWHERE = """
from cusprun.benchmarks import environment
environment.cpu_name = lambda: "another processor"
from cusprun.cli import main
main()
"""


def test_on_another_machine_speed_is_measured_anew_and_nothing_else(
    tmp_path: Path, expert: Path, pico_model: Path, own_text: Path
) -> None:
    out = tmp_path / "expert"
    shutil.copytree(expert, out)
    words = ("build", "--model", pico_model, "--corpus", own_text, "--out", out, "--ratio", 0.3, *MEASURED)
    again = run(*words)
    moved = subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, words)], capture_output=True, text=True)
    assert moved.returncode == 0, moved.stderr
    for stage in ("model", "gguf.f32", "quality.f32"):
        assert f"{stage}: done before, kept" in again.stderr
        assert f"{stage}: done before, kept" in moved.stderr
    assert "speed.f32: done before, kept" in again.stderr
    assert "speed.f32: done before, kept" not in moved.stderr
    dates = [json.loads((folder / "report" / "report.json").read_text())["measured_at"] for folder in (expert, out)]
    assert dates[0] < dates[1]


def test_expert_json(expert: Path) -> None:
    card = json.loads((expert / "expert.json").read_text())
    assert card["schema_version"] == 1
    anatomy = describe(expert / "model")
    assert card["expert"]["parameters"] == anatomy.parameters
    assert card["expert"]["macs_per_token"] == anatomy.macs_per_token
    assert 1 - card["expert"]["parameters"] / card["base"]["parameters"] == pytest.approx(0.3, abs=0.01)
    kept = [row["ffn_expert"] for row in card["expert"]["widths"] if row["ffn_expert"]]  # 0: the layer went whole
    assert kept == [layer.ffn for layer in anatomy.layers]
    assert card["expert"]["vocabulary"] == anatomy.vocab_size
    (artifact,) = card["artifacts"]
    path = expert / artifact["path"]
    assert artifact["sha256"] == sha256_file(path)
    assert artifact["bytes"] == path.stat().st_size
    assert artifact["proof"]["top1_agreement"] >= 0.999
    assert artifact["proof"]["kld_mean"] <= 1e-4
    info = load_metadata(path)
    assert info.parameters == anatomy.parameters
    assert info.metadata["general.base_model.0.name"] == card["base"]["id"].rpartition("/")[2]
    assert "general.base_model.0.repo_url" not in info.metadata  # a folder, of no hub
    assert info.metadata["general.tags"][0] == "cusprun"
    assert card["figures"]["parameters"]["ratio"] == pytest.approx(0.7, abs=0.01)


def test_report_json(expert: Path) -> None:
    report = json.loads((expert / "report" / "report.json").read_text())
    for side in ("expert", "dense"):
        row = report["speed"][side]
        for figure in ("prefill_tps", "decode_tps"):
            assert row[figure]["n"] == 2
            assert row[figure]["mean"] > 0
        for figure in ("ttft_ms", "load_s", "peak_rss_bytes", "file_bytes", "parameters", "macs_per_token"):
            assert row[figure] > 0
    quality = report["quality"]["corpora"]["scenario"]
    assert quality["expert"]["perplexity"] > 1
    assert quality["expert"]["bits_per_byte"] > 0
    assert len(report["layers"]) == 3
    assert {row["side"] for row in report["corpora"]} == {"calibration", "held-out"}
    assert report["method"]["calibration_tokens"] == 2048
    assert (expert / "report" / "report.md").is_file()
    assert report["samples"]
    assert all(sample["prompt"] and isinstance(sample["dense"], str) for sample in report["samples"])
    page = (expert / "report" / "report.html").read_text()
    assert "Sample answers" in page
    assert json.loads((expert / "expert.json").read_text())["artifacts"][0]["sha256"] in page


def test_calibration_text_is_not_evaluated_on(expert: Path, pico_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico_model)
    windows = load_file(expert / ".stages" / "windows.safetensors")
    seen = " ".join(tokenizer.decode(window) for ids in windows.values() for window in ids)
    for line in (expert / ".stages" / "texts.jsonl").read_text().splitlines():
        for document in json.loads(line)["documents"]:
            sentences = [sentence for sentence in document.split(". ") if len(sentence) > 40]
            assert sentences
            assert not [sentence for sentence in sentences if sentence in seen]


def test_the_same_command_keeps_every_stage(expert: Path, pico_model: Path, own_text: Path) -> None:
    before = artifacts(expert)
    done = run("build", "--model", pico_model, "--corpus", own_text, "--out", expert, "--ratio", 0.3, *MEASURED)
    for stage in ("text", "sensitivity", "prices", "spend", "refit", "model", "gguf.f32", "speed.f32", "quality.f32",
                  "samples.f32"):  # fmt: skip
        assert f"{stage}: done before, kept" in done.stderr
    assert artifacts(expert) == before
    assert "decode" in done.stdout  # the table
    assert str(expert / "gguf") in done.stdout


def test_a_recipe_replayed_gives_the_same_weights(expert: Path, tmp_path: Path) -> None:
    run("build", "--recipe", expert / "recipe.yaml", "--out", tmp_path / "again", "--no-measure")
    again = artifacts(tmp_path / "again")
    assert {name: digest for name, digest in artifacts(expert).items() if name != "recipe.yaml"} == {
        name: digest for name, digest in again.items() if name != "recipe.yaml"
    }


def test_a_damaged_artifact_is_made_again(expert: Path, pico_model: Path, own_text: Path) -> None:
    before = artifacts(expert)
    (path,) = expert.glob("gguf/*.gguf")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    (expert / "model" / "config.json").unlink()
    run("build", "--model", pico_model, "--corpus", own_text, "--out", expert, "--ratio", 0.3, *MEASURED)
    assert artifacts(expert) == before


def test_prune_stops_at_the_model_folder(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    out = tmp_path / "pruned"
    done = run("prune", pico_model, "--corpus", own_text, "--out", out, "--epsilon", 0.05, "--layout", "uniform",
               "--tokens", 2048, "--window", 64, "--align", 8)  # fmt: skip
    planned = next(line for line in done.stderr.splitlines() if line.startswith("output"))
    assert planned.endswith("model/")
    anatomy = describe(out / "model")
    assert anatomy.uniform
    assert anatomy.parameters < describe(pico_model).parameters
    assert not (out / "gguf").exists()
    target = tmp_path / "exported"
    run("export", out / "model", "--quant", "f16", "--out", target)
    assert load_metadata(next(target.glob("*.gguf"))).architecture == "llama"


def test_a_further_dimension_takes_part(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    from tests.conftest import write_text

    style = write_text(tmp_path / "style.txt", 1600, seed=11)
    out = tmp_path / "expert"
    run("build", "--model", pico_model, "--corpus", f"{own_text}:2", "--dim", f"style={style}", "--combine", "max",
        "--out", out, *QUICK)  # fmt: skip
    names = set(load_file(out / ".stages" / "windows.safetensors"))
    assert {name for name in names if "/" not in name} == {"general", "style"}


@pytest.mark.parametrize("method", ["refit", "shortgpt", "wanda-sp", "random"])
def test_an_expert_without_attention_in_a_layer_is_cut_again_or_refused(
    tmp_path: Path, own_text: Path, method: str
) -> None:
    dense = pico.save_model(tmp_path / "dense", num_hidden_layers=5)
    anatomy = describe(dense)
    channels = [tuple(range(layer.ffn)) for layer in anatomy.layers]
    kept = [LayerPlan(ffn, (0, 1)) for ffn in channels]
    kept[2], kept[3] = LayerPlan(channels[2], ()), LayerPlan(tuple(range(32)), (0, 1))  # and one as narrow as may be
    first, out = tmp_path / "first", tmp_path / "second"
    compact(dense, make_plan(anatomy, tuple(kept)), first)
    done = subprocess.run(
        command("prune", first, "--corpus", own_text, "--method", method, "--out", out, "--ratio", 0.2,
                "--tokens", 2048, "--window", 64, "--align", 8, "--layout", "per-layer"),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if method in ("wanda-sp", "random"):
        assert done.returncode == 2, done.stderr
        assert "layer 2 of this model has no attention any more" in done.stderr
        assert "--method refit" in done.stderr
        assert not out.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert describe(out / "model").parameters < describe(first).parameters


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "llm-pruner"])
def test_methods_of_one_corpus_score_one_by_its_tokens(
    tmp_path: Path, pico_model: Path, own_text: Path, method: str
) -> None:
    out = tmp_path / "pruned"
    run("prune", pico_model, "--corpus", f"{own_text}:7", "--dim", f"style={own_text}", "--method", method,
        "--out", out, "--ratio", 0.3, "--tokens", 4096, "--window", 64, "--align", 8, 
        "--layout", "per-layer")  # fmt: skip
    tokens = {
        name: float(ids.size)
        for name, ids in load_file(out / ".stages" / "windows.safetensors").items()
        if "/" not in name
    }
    assert len(set(tokens.values())) > 1, tokens
    anatomy, criterion = describe(pico_model), find_criterion(method)
    pooled = score_layers(
        Weights(pico_model), anatomy, load_statistics(out / ".stages" / "statistics"), criterion, "mixture", tokens
    )
    wanted = plan_method(criterion, anatomy, pooled, 0.3, align=8, layout="per-layer")
    got = json.loads((out / ".stages" / "plan.json").read_text())["value"]
    assert got["layers"] == wanted.to_json()["layers"]
    if method == "flap":  # the mean of what goes is that of the pooled text, too
        bias_compensation(
            pico_model, wanted, load_statistics(out / ".stages" / "statistics"), tmp_path / "biases", tokens
        )
        biases = load_file(tmp_path / "biases" / "model.safetensors")
        found = load_file(out / "model" / "model.safetensors")
        assert all(np.array_equal(found[name], value) for name, value in biases.items())


def test_epsilon_holds_on_every_dimension_s_text_for_refit_too(
    tmp_path: Path, pico_model: Path, own_text: Path
) -> None:
    out = tmp_path / "pruned"
    run("prune", pico_model, "--corpus", own_text, "--dim", f"style={own_text}", "--epsilon", 0.2, "--tokens", 4096,
        "--window", 64, "--align", 1, "--vocab", "keep", "--layout", "per-layer", "--out", out)  # fmt: skip
    anatomy, seen = describe(pico_model), load_statistics(out / ".stages" / "statistics")
    names = {name: 1.0 for name in load_file(out / ".stages" / "windows.safetensors") if "/" not in name}
    assert len(names) == 2
    criterion = find_criterion("cus-prun")
    scores = score_layers(Weights(pico_model), anatomy, seen, criterion, "intersection", names)
    wanted = plan_epsilon(anatomy, scores, 0.2, align=1, layout="per-layer")
    assert describe(out / "model").layers == wanted.expert.layers != anatomy.layers


def test_even_widths_take_the_same_share_of_every_layer(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    words = ("prune", pico_model, "--corpus", own_text, "--ratio", 0.2, "--tokens", 2048, "--window", 64, "--align", 1)
    run(*words, "--vocab", "keep", "--widths", "even", "--out", tmp_path / "even")
    before, after = describe(pico_model), describe(tmp_path / "even" / "model")
    assert max(layer.ffn for layer in after.layers) - min(layer.ffn for layer in after.layers) <= 1
    assert after.layers[0].ffn < before.layers[0].ffn
    assert 1 - after.parameters / before.parameters == pytest.approx(0.2, abs=0.01)
    assert (tmp_path / "even" / ".stages" / "refitted").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_that_the_same_command_goes_on(
    tmp_path: Path, pico_model: Path, own_text: Path, number: signal.Signals
) -> None:
    arguments = command("build", "--model", pico_model, "--corpus", own_text, "--out", tmp_path / "e", *QUICK)
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("needs"):
            break
    process.send_signal(number)
    message = process.stderr.read()
    assert process.wait(60) == 130
    assert "the same command goes on" in message
    assert "Traceback" not in message


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(
    tmp_path: Path, pico_model: Path, own_text: Path
) -> None:
    def build(out: Path) -> list[str]:
        return command("build", "--model", pico_model, "--corpus", own_text, "--out", out, "--quant", "q8_0", *QUICK)

    start = time.monotonic()
    subprocess.run(build(tmp_path / "whole"), check=True, capture_output=True)
    duration = time.monotonic() - start
    whole = artifacts(tmp_path / "whole")
    assert {name.split("/")[0] for name in whole} == {"gguf", "model", "recipe.yaml"}
    chance = random.Random(20261122)
    killed, ended, left = 0, 0, duration
    while killed < 10:  # one folder is gone on with until a run of it ends
        out = tmp_path / f"killed-{ended}"
        process = subprocess.Popen(
            build(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        moment = left * chance.uniform(0.15, 0.98)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            left += duration / 4 - moment  # about a quarter goes into starting
        else:
            ends_the_same(process.returncode, out, whole)
            ended, left = ended + 1, duration
    out = tmp_path / f"killed-{ended}"
    ends_the_same(subprocess.run(build(out), capture_output=True).returncode, out, whole)


def ends_the_same(returncode: int, out: Path, whole: dict[str, str]) -> None:
    assert returncode == 0
    assert artifacts(out) == whole
    assert not [path for path in out.rglob("*") if ".part" in path.name]


def test_cus_prun_slices_and_refit_repairs(tmp_path: Path, expert: Path, pico_model: Path, own_text: Path) -> None:
    out = tmp_path / "sliced"
    run(
        "build",
        "--model",
        pico_model,
        "--corpus",
        own_text,
        "--out",
        out,
        "--ratio",
        0.3,
        "--method",
        "cus-prun",
        *QUICK,
    )
    refitted, sliced = (load_file(folder / "model" / "model.safetensors") for folder in (expert, out))
    dense = load_file(pico_model / "model.safetensors")

    def vectors(tensors: dict[str, np.ndarray], part: str) -> set[tuple[float, ...]]:
        """Rows of up_proj, columns of down_proj, of all layers."""
        found = [tensor if "up" in part else tensor.T for name, tensor in tensors.items() if f"{part}_proj" in name]
        return {tuple(vector) for matrix in found for vector in matrix}

    assert vectors(sliced, "down") < vectors(dense, "down")
    assert vectors(refitted, "down") - vectors(dense, "down")
    assert vectors(sliced, "up") < vectors(dense, "up")
    assert vectors(refitted, "up") - vectors(dense, "up")  # the joint form moves them too
    names = [json.loads((folder / "expert.json").read_text())["method"]["name"] for folder in (expert, out)]
    assert names == ["refit", "cus-prun"]


def test_tied_and_untied_mistral_build(tmp_path: Path, own_text: Path) -> None:
    model = pico.save_model(tmp_path / "mistral", "mistral", tie_word_embeddings=False)
    run("build", "--model", model, "--corpus", own_text, "--out", tmp_path / "e", *QUICK)
    card = json.loads((tmp_path / "e" / "expert.json").read_text())
    assert card["artifacts"][0]["arch"] == "deci"


def test_onnx_is_exported_proved_and_measured(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    out = tmp_path / "expert"
    asked = ["--model", pico_model, "--corpus", own_text, "--out", out, "--ratio", 0.3, *MEASURED]
    asked[asked.index("--quant") + 1] = "int8"
    done = run("build", *asked)
    assert "onnx/ in int8" in done.stderr
    (entry,) = json.loads((out / "expert.json").read_text())["artifacts"]
    assert (entry["format"], entry["path"]) == ("onnx", "onnx/int8")
    assert entry["proof"]["tokenizer_equal"]
    assert not (out / "gguf").exists()
    speed = json.loads((out / "report" / "report.json").read_text())["speed"]
    assert (speed["expert"]["format"], speed["dense"]["format"]) == ("onnx", "onnx")
    assert "onnx.int8: done before, kept" in run("build", *asked).stderr
    assert run("chat", out, "--once", "Who pays the rent?", "--max-tokens", 4).returncode == 0


def test_rounding_goes_by_the_calibration_text(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    wish = ["build", "--model", pico_model, "--corpus", own_text, "--quant", "q4_0", "--out"]
    rest = [flag for flag in QUICK if flag not in ("--quant", "f32")]
    for rounding, told in (("imatrix", "imatrix"), ("auto", "gptq")):
        done = run(*wish, tmp_path / rounding, "--rounding", rounding, *rest)
        assert f"gguf/ in q4_0 ({told})" in done.stderr
    names = ("imatrix", "auto")
    entries = [json.loads((tmp_path / name / "expert.json").read_text())["artifacts"][0] for name in names]
    assert [entry["rounding"] for entry in entries] == ["imatrix", "gptq"]
    assert entries[0]["sha256"] != entries[1]["sha256"]
    assert not list((tmp_path / "auto" / ".stages").glob(".*"))  # what was rounded aside is gone
    (matrix,) = (tmp_path / "imatrix" / "gguf").glob("*.imatrix")
    again = tmp_path / "again.gguf"
    run("export", tmp_path / "imatrix" / "model", "--quant", "q4_0", "--imatrix", matrix, "--out", again)
    tensors = [
        {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}
        for path in (again, next((tmp_path / "imatrix" / "gguf").glob("*.gguf")))
    ]
    assert tensors[0] == tensors[1]


def test_an_export_takes_an_importance_matrix_of_text(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    target = tmp_path / "x.gguf"
    run("export", pico_model, "--quant", "iq2_m", "--corpus", own_text, "--tokens", 4096, "--out", target)
    assert target.is_file()
    assert target.with_suffix(".imatrix").is_file()
