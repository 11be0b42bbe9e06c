"""torch and llama.cpp keep the same promises; every test here runs on both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes import Message, Runtime, Sampling, open_runtime
from cusprun.runtimes.generation import TextStream, draw, find_nucleus
from tests.pico import SENTENCES, save_model

TALK = [
    Message("system", "Be brief."),
    Message("user", "Who pays?"),
    Message("assistant", "Me."),
    Message("user", "Ok"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("runtimes") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    return export_gguf(folder, folder.parent / "model.gguf", "f32").path


@pytest.fixture(params=["torch", "llama.cpp"])
def runtime(request: pytest.FixtureRequest, folder: Path, artifact: Path) -> Runtime:
    return open_runtime(folder if request.param == "torch" else artifact, context=512, threads=1)


def close(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.allclose(left, right, atol=0.02))  # flash attention rounds to f16


def test_logits_in_all_ways_are_the_same(runtime: Runtime) -> None:
    tokens = runtime.encode(SENTENCES[0] * 10)[:200]
    every = runtime.logits(tokens)
    assert every.shape == (200, runtime.n_vocab)
    assert every.dtype == np.float32
    assert close(runtime.logits(tokens, start=150), every[150:])
    assert close(runtime.prefill(tokens), every[-1])
    assert close(runtime.prefill(tokens[:100]), every[99])
    for position in range(100, 110):
        assert close(runtime.step(tokens[position]), every[position])
    assert close(runtime.prefill(tokens, reuse=True), every[-1])
    assert close(runtime.logits(tokens[:7]), every[:7])  # an earlier call leaves no trace


def test_more_tokens_than_one_batch(folder: Path, artifact: Path) -> None:
    from cusprun.runtimes.llamacpp import LlamaCppRuntime

    one = LlamaCppRuntime(artifact, context=512, threads=1)
    tokens = one.encode(" ".join(SENTENCES) * 4)[:300]
    whole = one.logits(tokens)
    small = LlamaCppRuntime(artifact, context=512, threads=1)
    small._n_batch = 64  # the batch that a context of 64 would have
    assert close(small.logits(tokens), whole)
    assert close(small.logits(tokens, start=130), whole[130:])
    assert close(small.prefill(tokens), whole[-1])


def test_text_to_tokens_and_back(runtime: Runtime) -> None:
    text = "  Straße 42 🙂\n\n<|im_start|>x"
    plain, special = runtime.encode(text), runtime.encode(text, special=True)
    assert runtime.decode(plain) == runtime.decode(special) == text
    assert 1 in special
    assert 1 not in plain
    assert b"".join(map(runtime.token_bytes, plain)) == text.encode()
    assert runtime.encode("") == []
    assert runtime.bos is None


def test_chat_prompt(runtime: Runtime) -> None:
    assert runtime.chat_prompt(TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho pays?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nOk<|im_end|>\n<|im_start|>assistant\n"
    )


def test_both_runtimes_say_the_same(folder: Path, artifact: Path) -> None:
    left, right = open_runtime(folder, threads=1), open_runtime(artifact, threads=1)
    tokens = left.encode(left.chat_prompt(TALK), special=True)
    assert tokens == right.encode(right.chat_prompt(TALK), special=True)
    sampling = Sampling(max_tokens=24)
    said = list(left.generate(tokens, sampling))
    assert said == list(right.generate(tokens, sampling))
    assert said == list(left.generate(tokens, sampling))  # from a cache that holds the prompt
    assert left.end_tokens <= right.end_tokens


def test_generation_ends(runtime: Runtime) -> None:
    tokens = runtime.encode(SENTENCES[0])
    hot = Sampling(temperature=3.0, top_p=1.0, max_tokens=40, seed=5)
    first = list(runtime.generate(tokens, hot))
    assert first == list(runtime.generate(tokens, hot))
    assert first != list(runtime.generate(tokens, Sampling(temperature=3.0, top_p=1.0, max_tokens=40, seed=6)))
    assert not set(first) & runtime.end_tokens
    full = (tokens * 40)[: runtime.n_context - 3]
    assert len(list(runtime.generate(full, Sampling(max_tokens=100)))) <= 3


def test_impossible_calls(runtime: Runtime) -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        runtime.logits([])
    with pytest.raises(InvalidRequest, match="context"):
        runtime.logits([5] * (runtime.n_context + 1))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        runtime.logits([runtime.n_vocab])
    with pytest.raises(InvalidRequest, match="position 3"):
        runtime.logits([5, 6, 7], start=3)
    assert runtime.logits([5, 6]).shape[0] == 2  # and it goes on


def test_context_is_cut_to_the_trained_one(folder: Path, artifact: Path) -> None:
    assert open_runtime(folder, context=4096, threads=1).n_context == 512
    assert open_runtime(artifact, context=4096, threads=1).n_context == 512


def test_model_without_template(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", chat=False, num_hidden_layers=1)
    artifact = export_gguf(folder, tmp_path / "x.gguf", "f32").path
    for path in (folder, artifact):
        runtime = open_runtime(path, threads=1)
        assert not runtime.has_chat_template
        assert runtime.chat_prompt(TALK[1:]) == "Who pays?\n\nMe.\n\nOk\n\n"


def test_characters_over_several_tokens_wait(runtime: Runtime) -> None:
    text = "é🙂 né 日本 ok"
    stream = TextStream(runtime)
    pieces = [stream.feed(token) for token in runtime.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(runtime)
    half = runtime.encode("🙂")[:2]
    assert "".join(cut.feed(token) for token in half) == ""
    assert "\ufffd" in cut.flush()


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
@pytest.mark.parametrize("size", [100, 300, 20_000])
def test_nucleus_is_that_of_the_whole_vocabulary_sorted(spread: float, size: int) -> None:
    logits = np.round(np.random.default_rng(size).normal(0, spread, size), 2)  # rounded: many are equal
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    for top_p in (0.0, 0.1, 0.5, 0.95, 0.999):
        reached = int(np.searchsorted(np.cumsum(probabilities[order]), top_p))
        np.testing.assert_array_equal(find_nucleus(probabilities, top_p), order[: reached + 1])


def test_nucleus() -> None:
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    drawn = {draw(logits, Sampling(temperature=1.0, top_p=0.75), rng) for _ in range(200)}
    assert drawn == {0, 1}
    assert draw(logits, Sampling(temperature=0.0), rng) == 0
    assert {draw(logits, Sampling(temperature=1.0, top_p=1.0), rng) for _ in range(500)} == {0, 1, 2, 3}


@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_a_tiny_temperature_takes_the_likeliest(top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits = np.array([-3.0, 20.0, 19.0, -20.0], dtype=np.float32)
    for temperature in (1e-308, 5e-324, 1e-3):
        for shift in (0.0, -30.0):
            assert draw(logits + np.float32(shift), Sampling(temperature=temperature, top_p=top_p), rng) == 1


def test_paths_that_are_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    for path in (tmp_path / "empty", tmp_path / "text.txt", tmp_path / "absent"):
        with pytest.raises(InvalidRequest, match=path.name):
            open_runtime(path)
    with pytest.raises(InvalidRequest, match="cuda"):
        open_runtime(tmp_path, device="tpu")


def test_folder_without_one_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match=r"layers\.0\.mlp\.up_proj\.weight"):
        open_runtime(folder)
