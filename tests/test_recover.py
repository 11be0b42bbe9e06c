"""Recovery on tiny models: what it learns, what it ships, and that no interruption shows."""

from __future__ import annotations

import _thread
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cusprun.allocation import plan_ratio
from cusprun.anatomy import describe
from cusprun.checkpoint import Weights, load_model, load_tokenizer
from cusprun.compact import compact
from cusprun.errors import Failed, InvalidRequest
from cusprun.importance.slicegpt import slicegpt
from cusprun.methods import score_layers
from cusprun.plan import LayerPlan, make_plan
from cusprun.recover import SAVED_EVERY, estimate, recover
from cusprun.recover.held_out import group_windows, run_hashes, split_windows
from cusprun.recover.request import Course, tensor_shapes
from cusprun.recover.training import Training, adapted_modules, divergence, rate, read_note
from cusprun.statistics import collect
from tests import pico
from tests.conftest import write_text

WINDOW = 32
QUICK: dict[str, Any] = {"tokens": 24 * WINDOW, "rank": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def windows(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Text of the tokenizer's words in two dimensions of 20 windows."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt", 400, seed=1).read_text(encoding="utf-8")
    ids = load_tokenizer(pico_model)(text)["input_ids"][: 40 * WINDOW]
    both = np.array(ids, dtype=np.int64).reshape(40, WINDOW)
    return {"domain": both[:20], "language": both[20:]}


@pytest.fixture(scope="module")
def pruned(pico_model: Path, windows: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the tiny model's units are gone, differently in every layer."""
    anatomy = describe(pico_model)
    scores = score_layers(
        Weights(pico_model), anatomy, collect(pico_model, anatomy, windows), "cus-prun", "intersection"
    )
    out = tmp_path_factory.mktemp("pruned") / "model"
    compact(pico_model, plan_ratio(anatomy, scores, 0.3, align=8, layout="per-layer"), out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "cusprun_llama"
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_loss_goes_down_and_the_folder_has_the_same_shapes(
    pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    report = recover(pruned, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **QUICK)
    assert report.kept
    assert report.loss_after < report.loss_before - 0.2
    assert report.held_out_windows == 4
    assert report.training_windows == 36
    before, after = Weights(pruned), Weights(tmp_path / "out")
    assert {name: (before.shape(name), before.dtype(name)) for name in before} == {
        name: (after.shape(name), after.dtype(name)) for name in after
    }
    assert {path.name for path in pruned.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    load_tokenizer(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["cusprun"]["recovery"]["tokens"] == report.tokens == QUICK["tokens"]
    assert describe(pruned) == describe(tmp_path / "out")


def test_the_folder_loads_where_peft_is_not(pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    recover(pruned, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **QUICK)
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "import cusprun\nfrom transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_without_peft_the_message_says_what_to_install(pruned: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "import numpy as np\nfrom pathlib import Path\nfrom cusprun.recover import recover\n"
        f"recover(Path({str(pruned)!r}), {{'t': np.ones((8, 16), int)}}, Path({str(tmp_path / 'o')!r}), kind='lora', "
        f"state=Path({str(tmp_path / 's')!r}))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "MissingPackage" in found.stderr
    assert "pip install 'cusprun[recover]'" in found.stderr


def test_distilling_brings_the_model_nearer_to_the_dense_one(
    pruned: Path, pico_model: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    settings = {"tokens": 96 * WINDOW, "steps": 48, "learning_rate": 3e-3, "state": tmp_path / "state"}
    report = recover(pruned, windows, tmp_path / "out", kind="distill", teacher=pico_model, **settings)
    assert report.kept
    assert report.divergence_before is not None
    assert report.divergence_after is not None
    assert report.divergence_after < 0.93 * report.divergence_before
    held_out = torch.from_numpy(split_windows(windows, 0).held_out)
    with torch.no_grad():
        dense, recovered = (load_model(path)(held_out).logits for path in (pico_model, tmp_path / "out"))
    apart = (dense.softmax(-1) * (dense.log_softmax(-1) - recovered.log_softmax(-1))).sum(-1)[:, :-1].mean()
    assert float(apart) == pytest.approx(report.divergence_after, rel=1e-4)  # of the folder as written


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("mistral", {"tie_word_embeddings": False})],
)
def test_dense_models_of_every_family_recover(
    family: str, settings: dict[str, Any], windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """LoRA alone, the rival that prunes nothing."""
    model = pico.save_model(tmp_path / "dense", family, **settings)
    report = recover(model, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **QUICK)
    assert report.loss_after < report.loss_before
    load_model(tmp_path / "out")


@pytest.mark.parametrize("method", ["slicegpt", "shortgpt", "flap"])
def test_what_other_methods_leave_recovers(
    method: str, pico_model: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """A sliced hidden size with shortcuts, fewer layers with one lacking its attention, biases that dense lacks."""
    anatomy, expert = describe(pico_model), tmp_path / "expert"
    if method == "slicegpt":
        slicegpt(pico_model, anatomy, windows, 0.2, expert)
    else:
        whole = LayerPlan(tuple(range(128)), (0, 1))
        layers = (whole, LayerPlan(tuple(range(64)), ()), LayerPlan((), ())) if method == "shortgpt" else (whole,) * 3
        plan = make_plan(anatomy, layers)
        if method == "flap":
            plan = replace(plan, expert=replace(plan.expert, attention_bias=True, mlp_bias=True))
        compact(pico_model, plan, expert)
    report = recover(expert, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **QUICK)
    assert report.loss_after < report.loss_before
    assert tensor_shapes(tmp_path / "out") == tensor_shapes(expert)
    load_model(tmp_path / "out")


def train(model: Path, windows: dict[str, np.ndarray], steps: int) -> Training:
    course = Course("lora", 4, steps, 2, 1e-2, 0)
    training = Training(load_model(model), None, tensor_shapes(model), windows["domain"], course, "cpu")
    for _ in range(steps):
        training.step()
    return training


def test_the_merged_model_equals_the_adapter_model(
    pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from cusprun.recover import write_recovered

    training = train(pruned, windows, 4)
    (tmp_path / "out").mkdir()
    write_recovered(pruned, tmp_path / "out", training.change, {})
    ids = torch.from_numpy(windows["language"][:4])
    with torch.no_grad():
        plain, merged = (load_model(path)(ids).logits for path in (pruned, tmp_path / "out"))
        adapted = training.model.float()
        for name, parameter in adapted.get_base_model().named_parameters():
            if "lora_" not in name:  # training may hold the frozen weights in bfloat16; the adapter is meant for these
                parameter.copy_(Weights(pruned)[name.replace(".base_layer", "")])
        torch.testing.assert_close(merged, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert (merged - plain).abs().max() > 0.1


def test_every_linear_map_of_the_layers_learns_and_nothing_else(pruned: Path, windows: dict[str, np.ndarray]) -> None:
    training = train(pruned, windows, 2)
    for name in tensor_shapes(pruned):
        change = training.change(name)
        assert (change is not None and float(change.abs().max()) > 0) == name.endswith("_proj.weight"), name
    assert len(adapted_modules(tensor_shapes(pruned))) == 7 * 3


def test_stored_types_stay(pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = load_model(pruned).bfloat16()
    half = tmp_path / "half"
    model.save_pretrained(half)
    recover(half, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **QUICK)
    weights = Weights(tmp_path / "out")
    assert {weights.dtype(name) for name in weights} == {"BF16"}


def interrupt_after(saved: Path, step: int) -> threading.Thread:
    """Presses Ctrl-C once the state says that so many steps are done."""

    def wait() -> None:
        limit = time.monotonic() + 60
        while read_note(saved).get("done", 0) < step and time.monotonic() < limit:
            time.sleep(0.002)
        _thread.interrupt_main()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


LONG: dict[str, Any] = {"tokens": 48 * WINDOW, "rank": 4, "learning_rate": 5e-3}


@pytest.mark.parametrize("kind", ["lora", "distill"])
def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(
    kind: Any, pruned: Path, pico_model: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    settings = {"kind": kind, "teacher": pico_model, **LONG}
    whole = recover(pruned, windows, tmp_path / "whole", state=tmp_path / "other", **settings)
    saved = tmp_path / "state" / "progress.safetensors"
    for step in (1, SAVED_EVERY + 1, 2 * SAVED_EVERY + 1):
        thread = interrupt_after(saved, step)
        with pytest.raises(KeyboardInterrupt):
            recover(pruned, windows, tmp_path / "out", state=tmp_path / "state", **settings)
        thread.join()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "state", "whole"]
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["progress.safetensors"]
    resumed = recover(pruned, windows, tmp_path / "out", state=tmp_path / "state", **settings)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    again = recover(pruned, windows, tmp_path / "out", state=tmp_path / "state", **settings)
    assert again == resumed  # a finished state needs no step
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_killed_run_goes_on(pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(windows, tmp_path / "windows.safetensors")
    program = (
        "from pathlib import Path\nfrom safetensors.numpy import load_file\nfrom cusprun.recover import recover\n"
        f"here = Path({str(tmp_path)!r})\nrecover(Path({str(pruned)!r}), load_file(here / 'windows.safetensors'), "
        f"here / 'out', kind='lora', state=here / 'state', **{LONG!r})\n"
    )
    saved = tmp_path / "state" / "progress.safetensors"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as child:
        while read_note(saved).get("done", 0) < 2 * SAVED_EVERY and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = read_note(saved)["done"]
    assert done >= 2 * SAVED_EVERY
    recover(pruned, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **LONG)
    recover(pruned, windows, tmp_path / "whole", kind="lora", state=tmp_path / "other", **LONG)
    torch.testing.assert_close(
        Weights(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"],
        Weights(tmp_path / "whole")["model.layers.0.mlp.down_proj.weight"],
    )


@pytest.mark.parametrize("damage", ["truncated", "text", "other"])
def test_a_state_of_something_else_is_not_trusted(
    damage: str, pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    recover(pruned, windows, tmp_path / "whole", kind="lora", state=tmp_path / "state", **QUICK)
    saved = tmp_path / "state" / "progress.safetensors"
    if damage == "truncated":
        saved.write_bytes(saved.read_bytes()[:500])
    elif damage == "text":
        saved.write_text("not a tensor in sight")
    else:
        recover(pruned, windows, tmp_path / "x", kind="lora", state=tmp_path / "state", **{**QUICK, "rank": 2})
    recover(pruned, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **QUICK)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_what_makes_it_worse_is_not_shipped(
    pruned: Path, pico_model: Path, windows: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**QUICK, "learning_rate": 0.3, "teacher": pico_model, "state": tmp_path / "state"}
    report = recover(pruned, windows, tmp_path / "out", kind="distill", **settings)
    assert not report.kept
    assert (report.divergence_after or 0) > (report.divergence_before or 0)
    before, after = Weights(pruned), Weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "recovery" not in json.loads((tmp_path / "out" / "config.json").read_text())["cusprun"]
    assert "the weights stay as they were" in capsys.readouterr().err


def test_a_loss_without_end_is_an_error(pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    settings = {**QUICK, "learning_rate": 1e30}
    with pytest.raises(Failed, match="lower the learning rate"):
        recover(pruned, windows, tmp_path / "out", kind="lora", state=tmp_path / "state", **settings)
    assert not (tmp_path / "out").exists()


def test_the_time_is_estimated(pruned: Path, windows: dict[str, np.ndarray]) -> None:
    few = estimate(pruned, windows, kind="lora", tokens=40 * WINDOW)
    many = estimate(pruned, windows, kind="lora", tokens=4000 * WINDOW)
    assert 0 < few < many


def test_the_learning_rate_rises_and_falls() -> None:
    course = Course("lora", 4, 100, 1, 1.0, 0)
    rates = [rate(course, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(1 / 90)


def test_every_window_is_seen_before_one_is_seen_again(pruned: Path, windows: dict[str, np.ndarray]) -> None:
    course = Course("lora", 4, 20, 2, 1e-2, 0)
    training = Training(load_model(pruned), None, tensor_shapes(pruned), windows["domain"], course, "cpu")
    for start in (0, 10):
        seen = torch.cat([training.batch(step) for step in range(start, start + 10)])
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, windows["domain"].tolist()))
    assert not torch.equal(training.batch(0), training.batch(10))


def test_divergence_is_what_torch_says() -> None:
    ours, dense = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = (torch.distributions.Categorical(logits=each[:, :-1]) for each in (dense, ours))
    torch.testing.assert_close(divergence(ours, dense), torch.distributions.kl_divergence(p, q).mean())


# held out ------------------------------------------------------------------------------------------------------------


def test_windows_of_one_document_stay_on_one_side() -> None:
    """Twenty dimensions' worth of overlap: every document stands in both dimensions, shifted."""
    chance = np.random.default_rng(0)
    texts = chance.integers(0, 1000, size=(30, 300))
    windows = {"domain": texts[:, :256].copy(), "language": texts[:, 44:].copy()}
    split = split_windows(windows, 0)
    assert split.shared == 0
    assert len(split.held_out) == 6
    assert len(split.training) == 54
    trained = {bytes(run) for ids in split.training for run in np.lib.stride_tricks.sliding_window_view(ids, 64)}
    held = {bytes(run) for ids in split.held_out for run in np.lib.stride_tricks.sliding_window_view(ids, 64)}
    assert not trained & held


def test_each_dimension_is_held_out_and_uniform_text_is_counted() -> None:
    chance = np.random.default_rng(0)
    windows = {"domain": chance.integers(0, 9, size=(20, 64)), "task": np.ones((20, 64), dtype=np.int64)}
    split = split_windows(windows, 0)
    assert len(split.held_out) == 4
    assert split.shared == 2  # the ones
    assert split_windows(windows, 0).held_out.tolist() == split.held_out.tolist()


def test_something_is_left_to_train_on() -> None:
    windows = {f"d{number}": np.arange(64).reshape(1, 64) + number * 64 for number in range(4)}
    split = split_windows(windows, 0)
    assert (len(split.held_out), len(split.training)) == (1, 3)


def test_runs_are_hashed_where_they_stand() -> None:
    ids = np.arange(40).reshape(2, 20) % 13
    hashes_ = run_hashes(ids, 5)
    assert hashes_.shape == (2, 16)
    equal = hashes_[:, None, :, None] == hashes_[None, :, None, :]
    views = np.lib.stride_tricks.sliding_window_view(ids, 5, axis=1)
    assert (equal == (views[:, None, :, None] == views[None, :, None, :]).all(-1)).all()
    assert len(set(group_windows(ids, 5))) == 1
    assert len(set(group_windows(ids, 20))) == 2


# the door ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "sft"}, "write lora or distill"),
        ({"kind": "distill"}, "name its folder"),
        ({"rank": 0}, "rank of 0"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 25}, "at most 24 steps"),
        ({"tokens": 8}, "less than one window of 32"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"device": "tpu"}, "write cpu or cuda"),
        ({"windows": {}}, "windows of one length"),
        ({"windows": {"a": np.ones((4, 8), int), "b": np.ones((4, 9), int)}}, "windows of one length"),
        ({"windows": {"a": np.ones((3, 8), int)}}, "too few"),
        ({"windows": {"a": np.full((8, 16), 10**6)}}, "outside the vocabulary"),
        ({"windows": {"a": np.full((8, 16), -1)}}, "outside the vocabulary"),
        ({"windows": {"a": np.ones((8, 1024), int)}}, "do not fit the model"),
    ],
)
def test_what_makes_no_sense_is_said(
    change: dict[str, Any], words: str, pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"windows": windows, "kind": "lora", **QUICK, **change}
    with pytest.raises(InvalidRequest, match=words):
        recover(pruned, out=tmp_path / "out", state=tmp_path / "state", **settings)
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_another_vocabulary_is_refused(
    pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path
) -> None:
    other = pico.save_model(tmp_path / "dense", vocab_size=999)
    with pytest.raises(InvalidRequest, match="999 tokens"):
        recover(pruned, windows, tmp_path / "out", kind="distill", teacher=other, state=tmp_path / "state", **QUICK)


def test_what_is_read_is_not_written_over(pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="name another folder"):
        recover(pruned, windows, pruned, kind="lora", state=tmp_path / "state", **QUICK)


def test_the_same_work_in_fewer_steps(pruned: Path, windows: dict[str, np.ndarray], tmp_path: Path) -> None:
    report = recover(pruned, windows, tmp_path / "out", kind="lora", steps=6, state=tmp_path / "state", **QUICK)
    assert (report.steps, report.tokens) == (6, QUICK["tokens"])
