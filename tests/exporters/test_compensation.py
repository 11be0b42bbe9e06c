"""Rounding with compensation: the formula, the blocks of both runtimes, and that it is better where it is read."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cusprun.checkpoint import Weights
from cusprun.exporters.compensation import (
    GRIDS,
    MATRICES,
    RIDGE,
    Compensated,
    compensate_model,
    fit_scales,
    gguf_blocks,
    nearest,
    round_compensated,
)
from cusprun.exporters.gguf import GgufExport, export_gguf
from cusprun.exporters.onnx import export_onnx
from cusprun.runtimes import open_runtime
from tests.exporters.models import make, windows

GGUF = [quant for quant in GRIDS if quant != "int4"]


def problem(outputs: int = 12, inputs: int = 64, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs of it that depend on one another."""
    torch.manual_seed(0)
    mixed = torch.randn(tokens, inputs) @ (torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs) / inputs**0.5)
    return torch.randn(outputs, inputs), mixed


@pytest.mark.parametrize("quant", GRIDS)
def test_equals_the_plain_formula(quant: str) -> None:
    """Column after column with the inverse taken anew each time, as Optimal Brain Surgeon has it."""
    grid = GRIDS[quant]
    weight, read = problem()
    moments = read.T @ read / len(read)
    found = round_compensated(weight, moments, grid)
    damped = moments.double() + RIDGE * moments.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    left, value = weight.double().clone(), torch.empty(12, 64)
    for column in range(64):
        inverse = damped[column:, column:].inverse()
        if column % grid.block == 0:
            ends = [1 / damped[at:, at:].inverse()[0, 0] for at in range(column, column + grid.block)]
            scale, minimum = fit_scales(left[:, column : column + grid.block].float(), torch.stack(ends).float(), grid)
        _, value[:, column] = nearest(left[:, column].float(), scale, minimum, grid)
        error = (left[:, column] - value[:, column]) / inverse[0, 0]
        left[:, column:] -= torch.outer(error, inverse[0])
    same = (found.weights(grid) - value).abs() < 1e-4
    assert same.float().mean() > 0.97  # a weight that lies between two levels may go either way


@pytest.mark.parametrize("quant", GRIDS)
def test_loses_less_of_the_output_than_rounding_alone(quant: str) -> None:
    grid = GRIDS[quant]
    weight, read = problem()
    moments = read.T @ read / len(read)
    compensated = round_compensated(weight, moments, grid).weights(grid)
    alone = round_compensated(weight, torch.eye(64), grid).weights(grid)  # inputs that know nothing of one another
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
    nothing = round_compensated(weight, torch.zeros(64, 64), grid).weights(grid)
    scale, minimum = fit_scales(weight[:, :32], torch.ones(32), grid)
    _, wanted = nearest(weight[:, :32], scale[:, None], minimum[:, None], grid)
    torch.testing.assert_close(nothing[:, :32], wanted)


@pytest.mark.parametrize("quant", GRIDS)
def test_the_files_hold_what_was_rounded(tmp_path: Path, quant: str) -> None:
    folder = make(tmp_path / "model", layout="per-layer")
    compensate_model(folder, {"text": windows(folder)}, quant, tmp_path / "store")
    held = Compensated(tmp_path / "store")
    names = [f"model.layers.{index}.{name}.weight" for index in range(3) for name in MATRICES]
    there = [name for name in names if Weights(folder).shape(name)[1] % 32 == 0]
    assert [name for name in names if name in held] == there
    if quant == "int4":
        export_onnx(folder, tmp_path / "onnx", "int4", compensated=tmp_path / "store")
        import onnx
        import onnx.numpy_helper

        graph = onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        packed = tensors["layers.1.down.weight"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(int) - 8
        found = (codes * tensors["layers.1.down.scales"][..., None]).reshape(len(packed), -1)
        open_runtime(tmp_path / "onnx", threads=1).logits(windows(folder)[0].tolist())
    else:
        GgufExport(folder, quant).write(tmp_path / "x.gguf", compensated=tmp_path / "store")
        reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        tensor = reader["blk.1.ffn_down.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        open_runtime(tmp_path / "x.gguf", threads=1).logits(windows(folder)[0].tolist())
    wanted = held["model.layers.1.mlp.down_proj.weight"].weights(GRIDS[quant]).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    if quant != "int4":
        export_gguf(folder, tmp_path / "plain.gguf", quant)
        plain = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
        assert (plain["blk.1.attn_q.weight"].data == reader["blk.1.attn_q.weight"].data).all()
        assert (plain["blk.1.ffn_down.weight"].data != tensor.data).any()
