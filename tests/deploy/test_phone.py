"""The phone's bundle: what is in it, that both runtimes open it, and what is said of ARM."""

from __future__ import annotations

import gc
import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llama_cpp
import onnxruntime
import onnxruntime_genai
import pytest

from cusprun.deploy.expert import Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Wish, find_target
from cusprun.deploy.targets.phone import arm_repack, gather
from cusprun.deploy.targets.phone_notes import VERSIONS
from cusprun.deploy.targets.phone_prompt import prompt_around_a_question
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.gguf_repack import repacked
from cusprun.exporters.onnx_folder import DATA
from cusprun.files import sha256_file, sha256_tree
from cusprun.runtimes import Message, open_runtime
from cusprun.runtimes.gguf_header import load_metadata
from cusprun.runtimes.llamacpp import built_with_amx
from tests import pico
from tests.deploy.phone_bundle import NAME, make_expert, write_bundle
from tests.llama import open_llama

PART = 60_000  # bytes, so that a tiny model goes into several files
ONNX = f"onnx/{NAME}"


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Expert:
    return make_expert(tmp_path_factory.mktemp("expert"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, expert: Expert) -> Path:
    out = tmp_path_factory.mktemp("phone")
    write_bundle(expert, out)
    return out


def answer(folder: Path, question: str, tokens: int) -> tuple[list[int], str]:
    """What the Android sample does, call by call."""
    model = onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    prompt = tokenizer.encode(question)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(prompt)
    stream, found, text = tokenizer.create_stream(), [], ""
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
        text += stream.decode(found[-1])
    return found, text


def test_holds_both_forms_and_every_sample(bundle: Path, expert: Expert) -> None:
    assert find_target("phone") is gather
    assert {path.name for path in bundle.iterdir()} == {"gguf", "onnx", "android", "react-native", "termux"}
    assert [path.name for path in (bundle / "gguf").iterdir()] == [f"{NAME}-q4_0.gguf"]  # q8_0 is listed first
    assert sha256_file(bundle / "gguf" / f"{NAME}-q4_0.gguf") == expert.of("gguf", "q4_0").sha256
    shipped = {path.name for path in (bundle / ONNX).iterdir()}
    whole = {path.name for path in expert.of("onnx").path.iterdir()}
    assert shipped == whole - {"run.py", "onnx_session.py"}


def test_tells_how_to_start_and_what_was_not_run(expert: Expert, tmp_path: Path) -> None:
    notes = write_bundle(expert, tmp_path)
    for command in ("sh termux/run.sh serve 8080", "npm run android", "gradle :app:installDebug"):
        assert command in notes.start
    assert f"`gguf/{NAME}-q4_0.gguf`" in notes.start
    assert f"`{ONNX}/`" in notes.start
    told = " ".join(notes.unproven)
    for part in ("react-native/", "termux/run.sh", "android/", "No speed was measured"):
        assert part in told
    assert VERSIONS["genai"] in " ".join(notes.needs)


def test_is_the_same_every_time(expert: Expert, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_bundle(expert, tmp_path / name, most=PART)
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")


def test_llama_cpp_opens_the_gguf_and_its_parts(bundle: Path, expert: Expert, tmp_path: Path) -> None:
    notes = write_bundle(expert, tmp_path, most=PART)
    parts = sorted((tmp_path / "gguf").iterdir())
    assert len(parts) > 1
    assert all(path.stat().st_size <= PART for path in parts)
    assert f"in {len(parts)} parts" in notes.start
    said = []
    for path in (parts[0], bundle / "gguf" / f"{NAME}-q4_0.gguf"):
        model = open_llama(path, n_ctx=128)
        reply = model.create_chat_completion([{"role": "user", "content": "rent"}], max_tokens=12, temperature=0)
        said.append(reply["choices"][0]["message"]["content"])
    assert said[0] == said[1] != ""


def test_onnxruntime_genai_opens_the_folder_and_its_parts(bundle: Path, expert: Expert, tmp_path: Path) -> None:
    write_bundle(expert, tmp_path, most=PART)
    weights = sorted((tmp_path / ONNX).glob("*.onnx.data"))
    assert len(weights) > 1
    assert all(path.stat().st_size <= PART for path in weights)
    assert not (tmp_path / ONNX / DATA).exists()
    prompt = prompt_around_a_question(expert.model)
    asked = f"{prompt.before}Who pays the rent?{prompt.after}"
    found, text = answer(bundle / ONNX, asked, 12)
    assert answer(tmp_path / ONNX, asked, 12) == (found, text)
    runtime = open_runtime(expert.of("onnx").path, context=128, threads=1)
    ids = runtime.encode(runtime.chat_prompt([Message("user", "Who pays the rent?")]), special=True)
    assert int(runtime.logits(ids)[-1].argmax()) == found[0]
    assert text


def test_what_is_split_goes_with_the_files(expert: Expert) -> None:
    files = Files()
    gather(expert, files, Wish(), PART)
    part = next(source.content for name, source in files if name.endswith("-00001-of-00003.onnx.data"))
    assert isinstance(part, Path)
    assert part.is_file()
    del files
    gc.collect()
    assert not part.exists()


def test_repacked_matrices_are_those_that_llama_cpp_repacks(tmp_path: Path) -> None:
    """llama.cpp names them as it loads; on this machine's processor, by the same rules with its row."""
    log = "import llama_cpp, sys; llama_cpp.Llama(sys.argv[1], n_ctx=32, n_threads=1, verbose=True)"
    arm = platform.machine() in ("aarch64", "arm64")
    if not arm and b"AVX2 = 1" not in llama_cpp.llama_print_system_info():
        pytest.skip("llama.cpp repacks nothing on this processor")
    if built_with_amx():
        pytest.skip("llama.cpp lays matrices out for AMX on this processor")
    counts = []
    for name, settings in {"tied": {"vocab_size": 512}, "untied": {"tie_word_embeddings": False}}.items():
        model = pico.save_model(tmp_path / name, intermediate_size=96, **settings)
        for types in ([], [("token_embd", "iq4_nl"), ("blk.1.ffn_up", "q4_1"), ("attn_k", "q4_1")]):
            path = tmp_path / f"{name}-{len(types)}.gguf"
            info = load_metadata(export_gguf(model, path, "q4_0", overrides=types).path)
            said = subprocess.run([sys.executable, "-c", log, path], capture_output=True, text=True, check=True).stderr
            found = repacked(info, "arm" if arm else "avx2")
            left = {tensor.name for tensor in found.left}
            matrices = {t.name for t in info.tensors if len(t.shape) == 2 and (info.tied or "token_embd" not in t.name)}
            assert set(re.findall(r"repack tensor (\S+) with", said)) == matrices - left
            counts.append(len(left))
    assert len(set(counts)) > 1


def test_the_share_that_arm_repacks(expert: Expert, tmp_path: Path) -> None:
    assert arm_repack(expert.of("gguf", "q4_0").path) == arm_repack(expert.of("gguf", "q8_0").path) == 1
    assert "All of its matrices' bytes" in write_bundle(expert, tmp_path / "all").start
    odd = pico.save_model(tmp_path / "odd")  # 497 tokens
    info = load_metadata(export_gguf(odd, tmp_path / "odd.gguf", "q4_0").path)
    found = repacked(info)
    assert [tensor.name for tensor in found.left] == ["token_embd.weight"]
    matrices = sum(tensor.bytes for tensor in info.tensors if len(tensor.shape) == 2)
    assert found.share == pytest.approx(1 - found.left[0].bytes / matrices)
    assert arm_repack(export_gguf(odd, tmp_path / "f16.gguf", "f16").path) == 0


def with_gguf(expert: Expert, path: Path, quant: str) -> Expert:
    artifact = replace(expert.of("gguf"), path=path, quant=quant, bytes=path.stat().st_size)
    return replace(expert, artifacts=(artifact,))


def test_advises_a_build_of_which_more_is_repacked(expert: Expert, tmp_path: Path) -> None:
    for vocab, quant, advice in ((497, "q4_0", "a `--vocab` that is a multiple of 8"), (512, "q4_1", "`--quant q4_0`")):
        model = pico.save_model(tmp_path / quant, vocab_size=vocab)
        path = export_gguf(model, tmp_path / f"{quant}.gguf", quant).path
        notes = write_bundle(with_gguf(expert, path, quant), tmp_path / f"out-{quant}")
        assert f"A build with {advice} has more" in notes.start


def test_takes_what_is_asked_for(expert: Expert, tmp_path: Path) -> None:
    write_bundle(expert, tmp_path / "q8", wish=Wish(quant="q8_0"))
    assert (tmp_path / "q8" / "gguf" / f"{NAME}-q8_0.gguf").is_file()
    assert (tmp_path / "q8" / "onnx").is_dir()
    notes = write_bundle(expert, tmp_path / "onnx", wish=Wish(format="onnx"))
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"onnx", "android"}
    assert "`--format gguf` ships it" in notes.start
    assert not any("termux" in line for line in notes.unproven)


def test_one_form_alone_says_how_to_build_the_other(expert: Expert, tmp_path: Path) -> None:
    gguf = replace(expert, artifacts=tuple(one for one in expert.artifacts if one.format == "gguf"))
    notes = write_bundle(gguf, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gguf", "react-native", "termux"}
    assert "built without onnx" in notes.start
    assert "--format gguf,onnx" in notes.start


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(format="onnx", quant="q4_0"), "q4_0 is a type of gguf, which is not asked for"),
        (Wish(quant="int8"), "and not onnx int8: build it with --format onnx --quant int8"),
        (Wish(quant="q4_0,q8_0"), "name one type of each format"),
        (Wish(quant="q9"), "unknown"),
        (Wish(format="pdf"), "write gguf or onnx"),
    ],
)
def test_wishes_that_cannot_be_met(expert: Expert, tmp_path: Path, wish: Wish, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        write_bundle(expert, tmp_path, wish=wish)


def test_an_expert_in_neither_form(expert: Expert, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="neither a GGUF nor an ONNX artifact: build it with --format gguf,onnx"):
        write_bundle(replace(expert, artifacts=()), tmp_path)


def test_the_prompt_is_the_chat_templates_and_knows_no_date(expert: Expert, tmp_path: Path) -> None:
    prompt = prompt_around_a_question(expert.model)
    runtime = open_runtime(expert.of("onnx").path, context=128, threads=1)
    assert prompt.before + "Why?" + prompt.after == runtime.chat_prompt([Message("user", "Why?")])
    pico.save_tokenizer(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ bos_token }}{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}\n> ")
    assert prompt_around_a_question(tmp_path).before == "<|im_start|>26 Jul 2024: "
    template.write_text("{{ messages | length }} messages")
    with pytest.raises(InvalidRequest, match="does not write a question once"):
        prompt_around_a_question(tmp_path)


def test_samples_are_pinned_to_what_was_run(bundle: Path) -> None:
    assert onnxruntime_genai.__version__ == VERSIONS["genai"]
    assert onnxruntime.__version__.rpartition(".")[0] == VERSIONS["onnxruntime"].rpartition(".")[0]
    needed = json.loads((bundle / "react-native" / "package.json").read_text())
    pins = {**needed["dependencies"], **needed["devDependencies"]}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in pins.values())
