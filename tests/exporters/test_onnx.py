"""onnxruntime computes what torch computes, and others open what we write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from cusprun.anatomy import describe
from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.quality import evaluate_corpora
from cusprun.checkpoint import Weights, load_model
from cusprun.deploy.chat import find_artifact
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.onnx import export_onnx
from cusprun.exporters.proof import check_graph, compare_on_windows, prove_onnx
from cusprun.runtimes import Sampling, open_runtime
from tests.exporters.models import make, windows
from tests.exporters.test_parity import BIASES, LLAMA3, assert_equal
from tests.pico import SENTENCES

INT4 = {
    "block 32": {},
    "block 128": {"block_size": 128},
    "k-quant": {"symmetric": False},
    "output in 4 bits": {"output_bits": 4},
}


def compare(folder: Path, out: Path, quant: str = "fp32", **settings: Any) -> dict[str, Any]:
    export_onnx(folder, out, quant, **settings)
    check_graph(str(out))
    saved = out.with_suffix(".npy")
    np.save(saved, windows(folder))
    return compare_on_windows(str(out), str(folder), str(saved), quant, 1)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("attention", ["gqa", "mha"])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_fp32_equals_torch(tmp_path: Path, layout: str, tied: bool, attention: str, biases: dict[str, bool]) -> None:
    folder = make(tmp_path / "model", layout=layout, attention=attention, tie_word_embeddings=tied, **biases)
    found = compare(folder, tmp_path / "onnx")
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8
    assert found["perplexity_artifact"] == pytest.approx(found["perplexity_torch"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "without-attention"},
        {"family": "mistral", "sliding_window": 16},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ],
    ids=["without attention", "sliding window", "llama3 rope", "linear rope"],
)
def test_other_forms_equal_torch(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = compare(make(tmp_path / "model", **settings), tmp_path / "onnx")
    assert_equal(found)
    assert found["kld_mean"] <= 1e-8


def test_proved_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    export_onnx(folder, tmp_path / "onnx", "fp32")
    proof = prove_onnx(tmp_path / "onnx", folder, "fp32", windows(folder))
    assert proof.tokenizer_equal
    assert proof.top1_agreement >= 0.999
    other = make(tmp_path / "other", layout="per-layer", seed=3)
    with pytest.raises(Failed, match=r"does not reproduce torch|is not the model"):
        prove_onnx(tmp_path / "onnx", other, "fp32", windows(folder))
    (tmp_path / "onnx" / "model.onnx.data").write_bytes(b"")
    with pytest.raises(Failed):
        prove_onnx(tmp_path / "onnx", folder, "fp32", windows(folder))


@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sizes_are_the_folders(tmp_path: Path, quant: str, tied: bool) -> None:
    """Every weight is there once: parameters, products and bytes say so."""
    folder = make(tmp_path / "model", layout="per-layer", tie_word_embeddings=tied, **BIASES)
    report = export_onnx(folder, tmp_path / "onnx", quant)
    ours, dense = cost(tmp_path / "onnx"), cost(folder)
    assert (ours.format, ours.quant) == ("onnx", quant)
    assert (ours.parameters, ours.macs_per_token) == (dense.parameters, dense.macs_per_token)
    tables = 2 * report.context * 8 * (2 if quant == "fp16" else 4)  # of the rotary embedding
    data = (tmp_path / "onnx" / "model.onnx.data").stat().st_size - tables
    bytes_of = {"fp32": 4, "fp16": 2, "int8": 1.2, "int4": 0.95}  # scales, and eight bits in the output layer
    assert data <= bytes_of[quant] * dense.parameters * 1.02


@pytest.mark.parametrize("settings", INT4.values(), ids=INT4)
def test_int4_holds_the_weights_rounded(tmp_path: Path, settings: dict[str, Any]) -> None:
    """What lies in the file, unpacked here by the operator's description, is at most half a step off the weights."""
    folder = make(tmp_path / "model", **BIASES)
    found = compare(folder, tmp_path / "onnx", "int4", **settings)
    weights = Weights(folder)
    model = load_model(folder)
    graph = onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 3 * 5 + 1
    state = model.state_dict()
    for node in products:
        wide = {attribute.name: attribute.i for attribute in node.attribute}
        bits, block, stem = wide["bits"], wide["block_size"], node.input[1].removesuffix(".weight")
        packed = tensors[node.input[1]]
        integers = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
        zeros = np.full(packed.shape[:2], 1 << (bits - 1))
        if len(node.input) > 3 and node.input[3]:
            halves = tensors[node.input[3]]
            zeros = np.stack([halves & 15, halves >> 4], axis=-1).reshape(len(halves), -1)[:, : packed.shape[1]]
        scales = tensors[node.input[2]]
        unpacked = ((integers.astype(int) - zeros[..., None]) * scales[..., None]).reshape(wide["N"], -1)
        unpacked = unpacked[:, : wide["K"]].astype(np.float32)
        names = names_of(stem)
        wanted = np.concatenate([weights[name].float().numpy() for name in names])
        step = np.repeat(np.abs(scales), block, axis=1)[:, : wide["K"]]
        # The symmetric type has no room for the largest magnitude's opposite, and a fit may cut a block's ends.
        cut = 1.001 if settings.get("symmetric", True) else 2
        assert (np.abs(unpacked - wanted) <= step * cut + 1e-7).all()
        assert (np.abs(unpacked - wanted) <= step * 0.5001 + 1e-7).mean() > 0.9
        first = 0
        for name in names:
            rows = len(weights[name])
            state[name].copy_(torch.from_numpy(unpacked[first : first + rows]))
            first += rows
    ids = windows(folder)[0]
    runtime = open_runtime(tmp_path / "onnx", threads=1)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    got = runtime.logits(ids.tolist())
    assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.999  # inputs are rounded to eight bits
    assert found["kld_mean"] < 1.0


def names_of(stem: str) -> list[str]:
    """Tensors of the model folder behind a matrix of the graph."""
    if stem == "embedding":
        return ["model.embed_tokens.weight"]
    _, layer, kind = stem.split(".")
    parts = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"]}
    return [f"model.layers.{layer}.{part}.weight" for part in parts.get(kind, [f"mlp.{kind}_proj"])]


def test_int8_and_fp16_are_close(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer", **BIASES)
    assert compare(folder, tmp_path / "fp16", "fp16")["kld_mean"] <= 1e-4
    assert compare(folder, tmp_path / "int8", "int8")["kld_mean"] <= 0.02


def test_int8_scales_each_token(tmp_path: Path) -> None:
    """A token with massive activations leaves the others theirs: logits of a text do not depend on its neighbours."""
    folder = make(tmp_path / "model")
    weights = Weights(folder)
    tensors = {name: weights[name].clone() for name in weights}
    tensors["model.embed_tokens.weight"][5] *= 1000
    for index in range(3):  # attention reads nothing of it: only a scale in common could tell
        tensors[f"model.layers.{index}.self_attn.v_proj.weight"].zero_()
        tensors[f"model.layers.{index}.input_layernorm.weight"].zero_()
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export_onnx(folder, tmp_path / "int8", "int8")
    runtime = open_runtime(tmp_path / "int8", threads=1)
    ids = windows(folder)[0][:16].tolist()
    alone, beside = runtime.logits(ids), runtime.logits([5, *ids])[1:]
    assert np.abs(alone - beside).max() < 0.02 * np.abs(alone).max()


def test_nothing_is_computed_that_nobody_reads(tmp_path: Path) -> None:
    """An output that has a name is allocated and written: two for each norm took 2 % of a decoding step."""
    folder = make(tmp_path / "model", layout="per-layer", **BIASES)
    export_onnx(folder, tmp_path / "onnx", "int4")
    graph = onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert [name for node in graph.node for name in node.output if name and name not in read] == []


def test_one_graph_for_prompt_and_decoding(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    export_onnx(folder, tmp_path / "onnx", "fp32")
    runtime, ids = open_runtime(tmp_path / "onnx", threads=1), windows(folder)[0].tolist()
    whole = runtime.logits(ids)
    steps = [runtime.prefill(ids[:20]), *(runtime.step(token) for token in ids[20:])]
    np.testing.assert_allclose(np.stack(steps), whole[19:], atol=1e-4)
    np.testing.assert_allclose(runtime.logits(ids, start=40), whole[40:], atol=1e-4)
    np.testing.assert_allclose(runtime.prefill(ids[:30], reuse=True), whole[29], atol=1e-4)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        runtime.step(10**6)
    with pytest.raises(InvalidRequest, match="do not fit the context"):
        open_runtime(tmp_path / "onnx", context=8).prefill(ids)


@pytest.mark.parametrize(
    ("layout", "quant"), [("per-layer", "fp32"), ("without-attention", "fp32"), ("uniform", "int4")]
)
def test_onnxruntime_genai_opens_the_folder(tmp_path: Path, layout: str, quant: str) -> None:
    folder = make(tmp_path / "model", layout=layout)
    export_onnx(folder, tmp_path / "onnx", quant)
    ids = windows(folder)[0][:12].tolist()
    code = """
import json, sys
sys.modules["cusprun"] = None  # it must do without
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
assert og.Tokenizer(model).decode(json.loads(sys.argv[2]))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=40, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(json.loads(sys.argv[2]))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "onnx"), json.dumps(ids)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)[12:]
    runtime = open_runtime(tmp_path / "onnx", threads=1)
    wanted = list(runtime.generate(ids, Sampling(max_tokens=28)))
    assert said[: len(wanted)] == wanted
    assert len(wanted) > 3


def test_the_folder_runs_with_plain_onnxruntime(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    export_onnx(folder, tmp_path / "onnx", "int8")
    code = "import runpy, sys; sys.modules['cusprun'] = None; sys.argv[0] = 'run.py'; sys.path.insert(0, {!r}); "
    code += "runpy.run_path({!r}, run_name='__main__')"
    there = tmp_path / "onnx"
    command = [sys.executable, "-c", code.format(str(there), str(there / "run.py")), SENTENCES[0], "--max-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runtime = open_runtime(there, threads=1)
    from cusprun.runtimes import Message

    tokens = runtime.encode(runtime.chat_prompt([Message("user", SENTENCES[0])]), special=True)
    said = runtime.decode(list(runtime.generate(tokens, Sampling(max_tokens=8))))
    assert done.stdout.strip() == said.strip()
    assert said.strip()


def test_evaluated_like_the_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    export_onnx(folder, tmp_path / "onnx", "fp32")
    assert find_artifact(tmp_path / "onnx") == tmp_path / "onnx"
    text = {"text": ["\n".join(SENTENCES * 20)]}
    found = [evaluate_corpora(path, text, context=64)["text"].artifact for path in (tmp_path / "onnx", folder)]
    assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-3)


def test_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    for settings, message in (
        ({"quant": "q8_0"}, "fp32 fp16 int8 int4"),
        ({"quant": "int4", "block_size": 64}, "32, 128"),
        ({"quant": "int4", "output_bits": 6}, "4, 8"),
        ({"quant": "fp32", "context": 4096}, "trained for 512"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            export_onnx(folder, tmp_path / "onnx", **settings)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="'dynamic' is not exported to ONNX"):
        export_onnx(folder, tmp_path / "onnx", "fp32")
    assert not (tmp_path / "onnx").exists()


def test_what_does_not_fit_is_named_and_nothing_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = make(tmp_path / "model")
    weights = Weights(folder)
    tensors = {name: weights[name].clone() for name in weights}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failed, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values beyond float16"):
        export_onnx(folder, tmp_path / "onnx", "fp16")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failed, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        export_onnx(folder, tmp_path / "onnx", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_graph_outside_its_folder_is_not_opened(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    export_onnx(folder, tmp_path / "onnx", "fp32")
    config = tmp_path / "onnx" / "genai_config.json"
    changed = json.loads(config.read_text())
    changed["model"]["decoder"]["filename"] = "../onnx/model.onnx"
    config.write_text(json.dumps(changed))
    with pytest.raises(InvalidRequest, match="outside the folder"):
        open_runtime(tmp_path / "onnx")
    assert describe(folder).layers
