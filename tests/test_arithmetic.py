"""Layers in bfloat16: near to float32 where the processor has units for it, the same bits where it has none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun import arithmetic
from cusprun.anatomy import describe
from cusprun.arithmetic import bfloat16_products
from cusprun.errors import Failed
from cusprun.layerwise import LayerwiseModel

IDS = np.random.default_rng(0).integers(3, 250, (3, 24))


def through(folder: Path, *, fast: bool) -> torch.Tensor:
    model = LayerwiseModel(folder, describe(folder), fast=fast)
    with torch.no_grad(), model.layer(0) as layer:
        return model.forward(layer, model.embed(IDS))


def test_without_such_units_a_fast_layer_is_the_plain_one(pico_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: False)
    assert torch.equal(through(pico_model, fast=True), through(pico_model, fast=False))


def test_a_fast_layer_is_near_and_gives_float32(pico_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: True)  # bfloat16 is right everywhere, if not fast
    fast, plain = through(pico_model, fast=True), through(pico_model, fast=False)
    assert fast.dtype == torch.float32
    assert 0 < float((fast - plain).norm() / plain.norm()) < 0.01


@pytest.mark.parametrize("units", ["amx_bf16", "avx512_bf16", None])
def test_units_are_those_that_the_processor_names(units: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"amx_bf16": False, "avx512_bf16": False, "avx2": True} | ({units: True} if units else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    arithmetic.has_bfloat16_units.cache_clear()
    try:
        assert arithmetic.has_bfloat16_units() is (units is not None)
        assert arithmetic.product_type("cpu") == (torch.bfloat16 if units else torch.float32)
        assert arithmetic.product_type("cuda") == torch.float32
    finally:
        arithmetic.has_bfloat16_units.cache_clear()


def test_precision_of_products_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: True)
    before = torch.get_float32_matmul_precision()
    with suppress(Failed), bfloat16_products("cpu"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise Failed("a layer is broken")
    assert torch.get_float32_matmul_precision() == before
    with bfloat16_products("cuda"):
        assert torch.get_float32_matmul_precision() == before


def test_products_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments keep far more digits than bfloat16 has, or a covariance would no longer be one."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    with bfloat16_products("cpu"):
        moments = x.T @ x
    exact = x.double().T @ x.double()
    assert float((moments - exact).norm() / exact.norm()) < 3e-3
    assert torch.equal(moments, moments.T)
    assert float(torch.linalg.eigvalsh(moments.double()).min()) > 0
