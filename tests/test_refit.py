"""Refit against independent least squares on the data itself, and what it must survive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cusprun.allocation import plan_ratio, score_layers
from cusprun.anatomy import describe
from cusprun.checkpoint import Weights, load_model
from cusprun.compact import compact
from cusprun.refit import RIDGES, Gram, choose_columns, choose_groups, fit, least_squares, refit, solve_symmetric
from cusprun.statistics import collect
from tests import pico

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def correlated(tokens: int, n: int) -> torch.Tensor:
    """Inputs whose columns explain one another in part."""
    return random(tokens, n // 2) @ random(n // 2, n) + 0.3 * random(tokens, n)


def gram_of(x: torch.Tensor) -> Gram:
    gram = Gram.empty(x.shape[1])
    for number, rows in enumerate(x.float().split(64)):
        gram.add(rows, number % 2, 1.0)
    return gram


def test_least_squares_equals_a_solver_on_the_data() -> None:
    x, matrix, kept = correlated(400, 12), random(5, 12), torch.tensor([0, 2, 3, 7, 9, 11])
    found = least_squares(matrix, x.T @ x / len(x), kept, 0.0)
    expected = torch.linalg.lstsq(x[:, kept], x @ matrix.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_large_ridge_leaves_the_columns_as_they_were() -> None:
    x, matrix, kept = correlated(400, 12), random(5, 12), torch.tensor([0, 2, 3, 7, 9, 11])
    torch.testing.assert_close(
        least_squares(matrix, x.T @ x / len(x), kept, 1e9), matrix[:, kept], rtol=1e-5, atol=1e-6
    )


def error(matrix: torch.Tensor, x: torch.Tensor, kept: list[int], columns: torch.Tensor) -> float:
    return float((x @ matrix.T - x[:, kept] @ columns.double().T).square().sum())


def test_fitting_beats_slicing_on_text_that_it_did_not_see() -> None:
    mixing, matrix = random(8, 16), random(6, 16)
    seen, unseen = (random(1000, 8) @ mixing + 0.3 * random(1000, 16) for _ in range(2))
    kept = choose_columns(matrix, seen.T @ seen / len(seen), 10)
    fitted = fit(matrix, gram_of(seen), torch.tensor(kept))
    assert error(matrix, unseen, kept, fitted) < 0.7 * error(matrix, unseen, kept, matrix[:, kept])


def test_with_few_tokens_fitting_is_no_worse_than_slicing() -> None:
    """Noise alone: nothing is to be learnt, and cross-validation finds that out."""
    seen, unseen, matrix = random(128, 24), random(4000, 24), random(6, 24)
    kept = list(range(0, 24, 2))
    fitted = fit(matrix, gram_of(seen), torch.tensor(kept))
    assert error(matrix, unseen, kept, fitted) < 1.15 * error(matrix, unseen, kept, matrix[:, kept])


def test_the_first_column_to_go_costs_least_of_all() -> None:
    x, matrix = correlated(500, 10), random(4, 10)
    moments = x.T @ x / len(x)
    costs = []
    for column in range(10):
        kept = [index for index in range(10) if index != column]
        costs.append(error(matrix, x, kept, least_squares(matrix, moments, torch.tensor(kept), 0.0)))
    (gone,) = set(range(10)) - set(choose_columns(matrix, moments, 9))
    assert costs[gone] <= 1.05 * min(costs)


def test_a_column_that_another_repeats_is_free() -> None:
    x, matrix = random(300, 8), random(4, 8)
    x[:, 5] = x[:, 2]
    kept = choose_columns(matrix, x.T @ x / len(x), 7)
    assert len({2, 5} & set(kept)) == 1
    fitted = fit(matrix, gram_of(x), torch.tensor(kept))
    assert error(matrix, x, kept, fitted) < 1e-3 * float((x @ matrix.T).square().sum())


def test_dead_channels_go_first_and_break_nothing() -> None:
    x, matrix = correlated(300, 12), random(4, 12)
    x[:, [1, 4, 6]] = 0
    kept = choose_columns(matrix, x.T @ x / len(x), 9)
    assert not {1, 4, 6} & set(kept)
    assert torch.isfinite(fit(matrix, gram_of(x), torch.tensor([0, 1, 4, 6, 7]))).all()


def test_singular_moments_are_solved() -> None:
    low = random(10, 3)
    left = low @ low.T
    right = left @ random(10, 2)
    torch.testing.assert_close(left @ solve_symmetric(left, right), right, rtol=1e-4, atol=1e-6)


def test_groups_go_whole_and_the_cheapest_first() -> None:
    x, matrix = random(400, 12), random(5, 12)
    matrix[:, 4:8] *= 0.01
    assert choose_groups(matrix, x.T @ x / len(x), 2, run=4) == [0, 2]
    assert choose_groups(matrix, x.T @ x / len(x), 3, run=4) == [0, 1, 2]


def test_what_all_columns_keep_is_not_touched() -> None:
    matrix = random(4, 6)
    assert torch.equal(fit(matrix, gram_of(random(128, 6)), torch.arange(6)), matrix.float())
    assert min(RIDGES) > 0


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}])
def test_a_refitted_model_is_nearer_to_the_dense_one(tmp_path: Path, settings: dict[str, object]) -> None:
    """Every channel has a twin, as trained models have neighbours: refitting finds what the twins can take over."""
    folder = pico.save_model(tmp_path / "dense", **settings)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensor[64:] = tensor[:64]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    anatomy = describe(folder)
    ids = np.random.default_rng(4).integers(3, 400, size=(24, 64))
    seen, unseen = ids[:20], torch.from_numpy(ids[20:])
    scores = score_layers(Weights(folder), anatomy, collect(folder, anatomy, {"t": seen}), "cus-prun", "intersection")
    plan = plan_ratio(anatomy, scores, 0.2, align=8, layout="per-layer")
    compact(folder, plan, tmp_path / "sliced")
    repaired = refit(folder, plan, {"t": seen}, tmp_path / "refitted")
    compact(folder, repaired, tmp_path / "expert", refitted=tmp_path / "refitted")
    assert repaired.expert == plan.expert  # the same widths
    with torch.no_grad():
        dense, sliced, expert = (
            load_model(path)(unseen).logits.log_softmax(-1)
            for path in (folder, tmp_path / "sliced", tmp_path / "expert")
        )
    divergence = [(dense.exp() * (dense - other)).sum(-1).mean() for other in (sliced, expert)]
    assert divergence[1] < 0.5 * divergence[0]
