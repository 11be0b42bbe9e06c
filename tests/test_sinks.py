"""Loud tokens and short windows, and that a refit takes both to heart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun import refit as refitting
from cusprun import sensitivity
from cusprun.anatomy import LayerWidths, describe
from cusprun.checkpoint import load_model
from cusprun.gauss_newton import Windows
from cusprun.gram import Gram
from cusprun.layerwise import LayerwiseModel
from cusprun.refit import Form, refit
from cusprun.sinks import EVERY, LOUDEST, START, scales, starts
from tests import pico

WINDOWS = np.random.default_rng(4).integers(3, 400, size=(24, 64))


def test_a_loud_token_counts_as_if_it_were_no_louder_than_others_may_be() -> None:
    norms = torch.tensor([[1.0, 1.1, 0.9, 1.0, 2.9], [24000.0, 1.0, 1.0, 0.0, 1.0]])[..., None]
    found = scales(norms)
    assert found.shape == norms.shape
    assert float((found * norms)[1, 0]) == pytest.approx(LOUDEST)
    assert (found.flatten()[[0, 1, 2, 3, 4, 6, 7, 8, 9]] == 1).all()


@pytest.mark.parametrize(("count", "length"), [(24, 512), (7, 512), (6, 128), (2, 100)])
def test_short_windows_come_from_within_windows_of_the_same_half(count: int, length: int) -> None:
    ids = np.arange(count * length).reshape(count, length)
    found = starts(ids)
    assert found.shape == (count // 2 * 2 * (length // EVERY), START)
    assert found.dtype == ids.dtype
    assert (np.diff(found, axis=1) == 1).all()
    windows, places = found[:, 0] // length, found[:, 0] % length
    assert (windows % 2 == np.arange(len(found)) % 2).all()
    assert (places > 0).all()
    assert len(set(found[:, 0].tolist())) == len(found)
    assert (np.bincount(windows) == length // EVERY).all()


def test_windows_too_short_or_too_few_give_none() -> None:
    assert starts(np.zeros((24, EVERY - 1), np.int64)).shape == (0, START)
    assert starts(np.zeros((1, 512), np.int64)).shape == (0, START)


def test_a_refit_reads_the_short_windows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico.save_model(tmp_path / "dense")
    read: list[np.ndarray] = []
    embed = LayerwiseModel.embed

    def remembered(self: LayerwiseModel, ids: np.ndarray) -> torch.Tensor:
        read.append(ids)
        return embed(self, ids)

    monkeypatch.setattr(LayerwiseModel, "embed", remembered)
    layers = describe(folder).layers
    refit(folder, describe(folder), list(layers), {"task": WINDOWS, "domain": WINDOWS[:, :32]}, tmp_path / "out")
    assert sum(ids.size for ids in read) == WINDOWS.size + starts(WINDOWS).size + WINDOWS[:, :32].size
    assert any(np.array_equal(ids, starts(WINDOWS)) for ids in read)


@pytest.mark.parametrize("form", ["parallel", "sequential", "joint"])
def test_a_refit_counts_errors_by_their_scales(tmp_path: Path, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other token counts nothing: nothing of it is in any moments, nor in the step of gate and up."""
    folder = pico.save_model(tmp_path / "dense")
    widths = [LayerWidths(each.ffn // 2, each.heads, each.kv_heads) for each in describe(folder).layers]

    def every_other(norms: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(norms)
        found[:, ::2] = 1
        return found

    silent: list[torch.Tensor] = []
    add_windows, tokens = Gram.add_windows, Windows.tokens

    def added(self: Gram, x: torch.Tensor, start: int, window: int, target: torch.Tensor | None = None) -> None:
        assert x[::2].any()
        silent.extend(each[1::2] for each in (x, target) if each is not None)
        add_windows(self, x, start, window, target)

    def given(self: Windows, part: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = tokens(self, part)
        assert (found[2][::2] == 1).all()
        silent.append(found[2][1::2])
        return found

    monkeypatch.setattr(refitting, "scales", every_other)
    monkeypatch.setattr(Gram, "add_windows", added)
    monkeypatch.setattr(Windows, "tokens", given)
    refit(folder, describe(folder), widths, {"task": WINDOWS}, tmp_path / "refitted", form=form)
    assert len(silent) > len(widths)
    assert not any(each.any() for each in silent)


def test_what_a_cut_costs_is_measured_with_the_same_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's own norms decide: the larger of before and after it; what counts nothing is in no moments."""
    folder = pico.save_model(tmp_path / "dense")
    windows = {"task": WINDOWS[:8]}
    with torch.no_grad():
        found = load_model(folder)(torch.from_numpy(WINDOWS[:8]), output_hidden_states=True).hidden_states[:-1]
    norms = [torch.maximum(*(each.norm(dim=-1) for each in pair)) for pair in pairwise(found)]
    told: list[torch.Tensor] = []
    moments: list[torch.Tensor] = []

    def first_alone(given: torch.Tensor) -> torch.Tensor:
        told.append(given.view(-1, 64))
        scale = torch.zeros(len(given) // 64, 64, 1)
        scale[:, 0] = 1
        return scale.view(-1, 1)

    def added(self: Gram, x: torch.Tensor, half: int, target: torch.Tensor | None = None) -> None:
        moments.append(x.view(-1, 64, x.shape[-1]))
        add(self, x, half, target)

    add = Gram.add
    monkeypatch.setattr(sensitivity, "scales", first_alone)
    monkeypatch.setattr(Gram, "add", added)
    sensitivity.measure(folder, describe(folder), windows, WINDOWS[:2])
    assert len(told) == len(describe(folder).layers)
    for given, expected in zip(told, norms, strict=False):  # what comes out of the last layer is normed there
        torch.testing.assert_close(given, expected, rtol=1e-2, atol=1e-2)
    assert moments
    assert all(each[:, 0].any() and not each[:, 1:].any() for each in moments)
