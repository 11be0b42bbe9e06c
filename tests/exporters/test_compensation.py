"""Rounding with compensation: the formula, the blocks of both runtimes, and that it is better where it is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from cusprun.checkpoint import Weights, load_model
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import compensation
from cusprun.exporters.compensation import (
    RIDGE,
    Compensated,
    Roundings,
    capped,
    compensate_model,
    round_compensated,
)
from cusprun.exporters.gguf import GgufExport
from cusprun.exporters.gguf_tensors import to_rotary_pairs
from cusprun.exporters.grids import GRIDS, Grid, fit_scales, gguf_blocks, nearest
from cusprun.exporters.onnx import OnnxExport
from cusprun.exporters.request import Settings, export_model
from cusprun.runtimes import open_runtime
from tests.exporters.models import make, windows
from tests.pico import SENTENCES
from tests.test_build import run

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
GGUF = [quant for quant in GRIDS if quant != "int4"]


def problem(outputs: int = 12, inputs: int = 256, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs of it that depend on one another."""
    torch.manual_seed(0)
    mixed = torch.randn(tokens, inputs) @ (torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs) / inputs**0.5)
    return torch.randn(outputs, inputs), mixed


@pytest.mark.parametrize("quant", GRIDS)
def test_equals_the_plain_formula(quant: str) -> None:
    """Column after column, the input that moves most first, with the inverse taken anew each time (GPTQ, act order)."""
    grid = GRIDS[quant]
    weight, read = problem()
    read = read * torch.linspace(0.2, 3, 256)[torch.randperm(256)]
    moments = read.T @ read / len(read)
    found = round_compensated(weight, moments, grid)
    damped = moments.double() + RIDGE * torch.diag(moments.double().diagonal())
    left, value = weight.double().clone(), torch.empty(12, 256)
    order = moments.diagonal().argsort(descending=True)
    for place, column in enumerate(order.tolist()):
        rest = order[place:]
        inverse = damped[rest][:, rest].inverse()
        scale, minimum = found.scales[:, column // grid.block], found.minima[:, column // grid.block]
        _, value[:, column] = nearest(left[:, column].float(), scale, minimum, grid)
        error = (left[:, column] - value[:, column]) / inverse[0, 0]
        left[:, rest] -= torch.outer(error, inverse[0])
    same = (found.weights(grid) - value).abs() < 1e-4
    assert same.float().mean() > 0.97  # a weight that lies between two levels may go either way


@pytest.mark.parametrize("quant", ["q4_1", "q4_0", "iq4_nl", "int4"])
def test_scales_are_the_best_of_many(quant: str) -> None:
    """In sum no scales of a fine row are better by more than a little, weighed as asked."""
    torch.manual_seed(2)
    grid = GRIDS[quant]
    block, importance = torch.randn(20, 32), torch.rand(20, 32) ** 4
    scale, minimum = fit_scales(block, importance, grid)

    def loss(tried: torch.Tensor) -> torch.Tensor:
        _, values = nearest(block, tried[:, None], minimum[:, None], grid)
        return ((block - values).square() * importance).sum(1)

    found = loss(scale)
    best = torch.stack([loss(scale * share) for share in np.linspace(0.75, 1.25, 201)]).amin(0)
    assert found.sum() <= 1.1 * best.sum()


def test_q4_k_in_the_file_of_a_wide_model(tmp_path: Path) -> None:
    """Rows of 256: q4_k_m has q4_k there, and what is of another type is left to llama.cpp."""
    folder = make(tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    held, grids, artifact = exported(folder, tmp_path, "q4_k_m")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(artifact).tensors}
    assert kinds["blk.1.ffn_up.weight"] == "Q4_K"
    name = "model.layers.1.mlp.up_proj.weight"
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(artifact).tensors}
    found = dequantized(reader["blk.1.ffn_up.weight"])
    np.testing.assert_allclose(found, held[name].weights(grids[name]).numpy(), rtol=1e-4, atol=1e-6)
    assert "Q6_K" in kinds.values()
    assert sum(kind == "Q4_K" for kind in kinds.values()) == sum(grid.together > 1 for grid in grids.values())
    open_runtime(artifact, threads=1).logits(windows(folder)[0].tolist())


@pytest.mark.parametrize("quant", GRIDS)
def test_loses_less_of_the_output_than_rounding_alone(quant: str) -> None:
    grid = GRIDS[quant]
    weight, read = problem()
    moments = read.T @ read / len(read)
    compensated = round_compensated(weight, moments, grid).weights(grid)
    alone = round_compensated(weight, torch.eye(256), grid).weights(grid)  # inputs that know nothing of one another
    errors = [float((read @ (weight - rounded).T).square().mean()) for rounded in (compensated, alone)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("quant", GGUF)
def test_blocks_are_ggml_s(quant: str) -> None:
    weight, read = problem()
    rounded = round_compensated(weight, read.T @ read, GRIDS[quant])
    kind = gguf.GGMLQuantizationType[quant.upper()]
    found = gguf.quants.dequantize(gguf_blocks(rounded, quant), kind)
    np.testing.assert_allclose(found, rounded.weights(GRIDS[quant]).numpy(), rtol=1e-5, atol=1e-7)


def test_dead_and_repeated_inputs() -> None:
    grid = GRIDS["q4_0"]
    weight, read = problem()
    read[:, 3] = 0
    read[:, 5] = read[:, 4]
    found = round_compensated(weight, read.T @ read / len(read), grid).weights(grid)
    assert torch.isfinite(found).all()
    nothing = round_compensated(weight, torch.zeros(256, 256), grid)
    _, wanted = nearest(weight[:, :32], nothing.scales[:, :1], nothing.minima[:, :1], grid)
    torch.testing.assert_close(nothing.weights(grid)[:, :32], wanted)
    with pytest.raises(Failed, match="not finite"):
        round_compensated(weight, torch.full((256, 256), torch.nan), grid)


def test_a_few_inputs_that_move_together_and_dwarf_the_rest() -> None:
    """What the massive first token does: in their own order the last of them would be left with everybody's errors."""
    grid = GRIDS["q4_0"]
    weight, read = problem(outputs=64)
    read[0, [10, 90, 250]] = 2000.0
    moments = read.T @ read / len(read)
    found, nothing = (round_compensated(weight, by, grid).weights(grid) for by in (moments, torch.eye(256)))
    errors = [float((read[0] @ (weight - rounded).T).square().mean()) for rounded in (found, nothing)]
    assert errors[0] < 0.1 * errors[1]


def test_inputs_of_very_different_size() -> None:
    """The ridge is each input's own: one that dwarfs the others takes nothing of what is known of them."""
    _, read = problem()
    size = torch.logspace(-2.5, 2.5, 256, dtype=torch.float64)[torch.randperm(256, generator=torch.manual_seed(1))]
    moments = (read.T @ read).double()
    plain, apart = compensation.find_factor(moments), compensation.find_factor(moments * torch.outer(size, size))
    torch.testing.assert_close(apart * size, plain.double(), rtol=1e-4, atol=1e-9)


def test_a_massive_token_does_not_decide() -> None:
    grid = GRIDS["q4_0"]
    weight, read = problem()
    beside = torch.cat([read, 3000 * torch.randn(1, 256)])
    errors = []
    for rows in (capped(beside), beside):
        found = round_compensated(weight, rows.T @ rows, grid).weights(grid)
        errors.append(float((read @ (weight - found).T).square().mean()))
    assert errors[0] < 0.9 * errors[1]
    assert torch.equal(capped(read), read)


def exported(folder: Path, out: Path, quant: str) -> tuple[Compensated, dict[str, Grid], Path]:
    """The artifact of a folder in one type with its compensated matrices, and their grids."""
    export: GgufExport | OnnxExport
    if quant == "int4":
        export, artifact = OnnxExport(folder, "int4"), out / "onnx"
    else:
        export, artifact = GgufExport(folder, quant), out / f"{quant}.gguf"
    compensate_model(folder, {"text": windows(folder)}, export.grids, out / "store")
    held = Compensated(out / "store")
    export.write(artifact, compensated=held)
    return held, export.grids, artifact


@pytest.mark.parametrize("quant", ["q8_0", "q5_0", "q4_1", "q4_0", "iq4_nl", "auto", "q4_k_m", "int4"])
def test_the_files_hold_what_was_rounded(tmp_path: Path, quant: str) -> None:
    """Every matrix whose rows divide into blocks, q and k in the order of rows that llama.cpp wants."""
    folder = make(tmp_path / "model", layout="per-layer")
    held, grids, artifact = exported(folder, tmp_path, quant)
    weights = Weights(folder)
    names = [f"model.layers.1.{name}.weight" for name in MATRICES]
    assert [name for name in names if name in held] == [name for name in names if weights.shape(name)[1] % 32 == 0]
    heads = {"self_attn.q_proj": 2, "self_attn.k_proj": 2}
    if quant == "int4":
        graph = onnx.load(str(artifact / "model.onnx")).graph
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        found = {
            name: unpack(tensors[f"layers.1.{stem}.weight"], tensors[f"layers.1.{stem}.scales"])
            for name, stem in (("mlp.down_proj", "down"), ("self_attn.o_proj", "o"), ("qkv", "qkv"))
        }
        rows = [held[name].weights(grids[name]) for name in names[:3]]
        np.testing.assert_allclose(found.pop("qkv"), torch.cat(rows).numpy(), rtol=1e-5, atol=1e-7)
    else:
        reader = {tensor.name: tensor for tensor in gguf.GGUFReader(artifact).tensors}
        found = {
            name: dequantized(reader[f"blk.1.{stem}.weight"])
            for name, stem in zip(MATRICES, ("attn_q", "attn_k", "attn_v", "attn_output", *FFN), strict=True)
            if f"model.layers.1.{name}.weight" in held
        }
    assert len(found) >= 2
    for name, values in found.items():
        tensor = f"model.layers.1.{name}.weight"
        wanted = held[tensor].weights(grids[tensor])
        if quant != "int4" and name in heads:
            wanted = to_rotary_pairs(wanted, heads[name])
        np.testing.assert_allclose(values, wanted.numpy(), rtol=1e-5, atol=1e-7)
    ids = windows(folder)[0]
    got = open_runtime(artifact, threads=1).logits(ids.tolist())
    model = load_model(folder)
    with torch.no_grad():
        for name, grid in grids.items():
            model.get_parameter(name).copy_(held[name].weights(grid))
        wanted = model(torch.from_numpy(ids)[None]).logits[0]
    assert np.corrcoef(got.ravel(), wanted.numpy().ravel())[0, 1] > 0.998  # the output matrix is rounded too


def dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def unpack(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A matrix of MatMulNBits in four bits, (outputs, inputs)."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(int) - 8
    return (codes * scales[..., None]).reshape(len(packed), -1)


def test_q_k_and_v_in_one_matrix(tmp_path: Path) -> None:
    """llama.cpp's openelm holds them so."""
    folder = make(tmp_path / "model", family="qwen3", layout="per-layer")
    held, grids, artifact = exported(folder, tmp_path, "q4_0")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(artifact).tensors}
    names = [f"model.layers.1.{name}.weight" for name in MATRICES[:3]]
    found = dequantized(reader["blk.1.attn_qkv.weight"])
    np.testing.assert_allclose(found, torch.cat([held[name].weights(grids[name]) for name in names]).numpy(), rtol=1e-5)


def test_export_rounds_both_formats(tmp_path: Path) -> None:
    folder, text = make(tmp_path / "pico", layout="per-layer"), tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 120))
    words = ["--quant", "q4_0,int4,f16", "--corpus", text, "--tokens", 2048, "--out"]
    done, weighed = (
        json.loads(run("export", folder, *words, tmp_path / how, "--rounding", how, "--json").stdout)["artifacts"]
        for how in ("auto", "imatrix")
    )
    assert [entry["rounding"] for entry in done] == ["gptq", "gptq", "nearest"]
    assert [entry["rounding"] for entry in weighed] == ["imatrix", "nearest", "nearest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto", "imatrix", "pico", "text.txt"]
    assert {path.name for path in (tmp_path / "auto").iterdir()} == {
        "int4", "pico-f16.gguf", "pico-q4_0.gguf", "pico-q4_0.imatrix"
    }  # fmt: skip
    for ours, other in zip(done[:2], weighed[:2], strict=True):
        assert ours["bytes"] == other["bytes"]
        assert ours["sha256"] != other["sha256"]


def test_rounds_once_for_the_same_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = make(tmp_path / "pico"), []
    real = compensation.compensate_model
    monkeypatch.setattr(compensation, "compensate_model", lambda *rest: (calls.append(rest[2]), real(*rest)))
    roundings = Roundings(folder, lambda: {"text": windows(folder)}, tmp_path)
    wide = {name: replace(grid, block=64) for name, grid in OnnxExport(folder, "int4").grids.items()}
    for grids in (OnnxExport(folder, "int4").grids, OnnxExport(folder, "int4").grids, wide):
        assert "model.layers.0.self_attn.q_proj.weight" in roundings.of(grids)
    assert len(calls) == 2
    del roundings
    assert [path.name for path in tmp_path.iterdir()] == ["pico"]


@pytest.mark.parametrize(
    ("types", "settings", "message"),
    [
        (["q4_0"], {"rounding": "gptq"}, "gptq needs text to round by: give it with --corpus"),
        (["q4_0"], {"rounding": "auto"}, "auto needs text"),
        (["f16"], {"rounding": "gptq", "corpus": Path("x")}, "changes nothing in f16"),
        (["int4"], {"rounding": "gptq", "corpus": Path("x"), "zero_points": True}, "symmetric blocks"),
        (["q4_0"], {"rounding": "nearest", "corpus": Path("x")}, "has no use for --imatrix or --corpus"),
        (["q4_0"], {"rounding": "imatrix"}, "needs --corpus TEXT or --imatrix FILE"),
        (["q4_0"], {"rounding": "up"}, "'up' is unknown: write auto, nearest, imatrix, gptq"),
    ],
)
def test_refused(tmp_path: Path, types: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        export_model(make(tmp_path / "pico"), tmp_path / "out", [], types, Settings(**settings))
    assert not (tmp_path / "out").exists()
