"""The fit of the kept columns against a solver on the data itself."""

from __future__ import annotations

import pytest
import torch

from cusprun.gram import BLOCK, Gram
from cusprun.least_squares import RIDGES, START, fit, refitted
from cusprun.surgeon import choose_columns

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def correlated(tokens: int, n: int) -> torch.Tensor:
    """Inputs whose columns explain one another in part."""
    return random(tokens, n // 2) @ random(n // 2, n) + 0.3 * random(tokens, n)


def moments_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def gram_of(x: torch.Tensor, target: torch.Tensor | None = None) -> Gram:
    gram = Gram.empty(x.shape[1], None if target is None else target.shape[1])
    gram.add_windows(x.float(), 0, 64, None if target is None else target.float())
    return gram


def all_of(x: torch.Tensor) -> Gram:
    gram = Gram.empty(x.shape[1], halves=1)
    gram.add(x.float(), 0)
    return gram


def error(wanted: torch.Tensor, x: torch.Tensor, kept: torch.Tensor, columns: torch.Tensor) -> float:
    return float((wanted - x[:, kept] @ columns.double().T).square().sum())


KEPT = torch.tensor([0, 2, 3, 7, 9, 11])


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, 2 * BLOCK + 17])
def test_moments_of_more_columns_than_are_multiplied_at_a_time(n: int) -> None:
    x = random(60, n)
    gram = Gram.empty(n, halves=1)
    for part in x.float().split(20):
        gram.add(part, 0)
    found = gram.mean(0)
    torch.testing.assert_close(found, moments_of(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[: BLOCK - 1, BLOCK:], found[BLOCK:, : BLOCK - 1].T)


def test_it_equals_a_solver_on_the_data() -> None:
    x, matrix = correlated(400, 12), random(5, 12)
    expected = torch.linalg.lstsq(x[:, KEPT], x @ matrix.T).solution.T
    found = refitted(matrix, all_of(x), KEPT, 0.0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)  # moments are sums in float32


def test_the_ridge_and_alpha_are_those_of_the_full_search() -> None:
    """Against every ridge and many α, each fitted on one half of the data by a solver and judged on the other."""
    x, matrix, target = correlated(256, 12), random(5, 12), random(256, 12) @ random(12, 5)
    target = x @ matrix.T + 0.5 * target
    windows = torch.arange(256) // 64 % 2
    best: tuple[float, torch.Tensor] | None = None
    for ridge in RIDGES:
        for alpha in torch.linspace(0, 1, 41):
            total = 0.0
            for half in (0, 1):
                fitted = ridged(matrix, x[windows == half], target[windows == half], ridge, float(alpha))
                total += error(target[windows != half], x[windows != half], KEPT, fitted)
            if best is None or total < best[0]:
                best = total, ridged(matrix, x, target, ridge, float(alpha))
    assert best is not None
    found, _ = fit(matrix, gram_of(x, target), KEPT)
    torch.testing.assert_close(found.double(), best[1], rtol=0.02, atol=0.02 * float(best[1].abs().max()))
    assert 0 < START < len(RIDGES) - 1


def ridged(matrix: torch.Tensor, x: torch.Tensor, target: torch.Tensor, ridge: float, alpha: float) -> torch.Tensor:
    """The penalized fit by stacking the penalty under the data."""
    inputs = x[:, KEPT]
    scale = (ridge * inputs.square().mean() * len(x)).sqrt()
    wanted = (1 - alpha) * x @ matrix.T + alpha * target
    rows = torch.cat([inputs, scale * torch.eye(len(KEPT), dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([wanted, scale * matrix[:, KEPT].T])).solution.T


def test_a_large_ridge_leaves_the_columns_as_they_were() -> None:
    x, matrix = correlated(400, 12), random(5, 12)
    found = refitted(matrix, all_of(x), KEPT, 1e9)
    torch.testing.assert_close(found, matrix[:, KEPT].float(), rtol=1e-5, atol=1e-6)


def test_fitting_beats_slicing_on_text_that_it_did_not_see() -> None:
    mixing, matrix = random(8, 16), random(6, 16)
    seen, unseen = (random(1024, 8) @ mixing + 0.3 * random(1024, 16) for _ in range(2))
    kept = torch.tensor(choose_columns(matrix, [moments_of(seen)], [10])[0])
    fitted, _ = fit(matrix, gram_of(seen), kept)
    wanted = unseen @ matrix.T
    assert error(wanted, unseen, kept, fitted) < 0.7 * error(wanted, unseen, kept, matrix[:, kept])


def test_with_few_tokens_fitting_is_no_worse_than_slicing() -> None:
    """Noise alone: nothing is to be learnt, and cross-validation finds that out."""
    seen, unseen, matrix = random(128, 24), random(4000, 24), random(6, 24)
    kept = torch.arange(0, 24, 2)
    fitted, wanted = fit(matrix, gram_of(seen), kept)[0], unseen @ matrix.T
    assert error(wanted, unseen, kept, fitted) < 1.15 * error(wanted, unseen, kept, matrix[:, kept])


def test_a_target_that_can_be_learnt_is() -> None:
    x, unseen, matrix, wrong = random(2048, 12), random(1000, 12), random(5, 12), 1.5 * random(5, 12)
    wrong[:, [1, 4, 5, 6, 8, 10]] = 0
    target = x @ (matrix + wrong).T
    wanted = unseen @ (matrix + wrong).T
    repaired, own = fit(matrix, gram_of(x, target), KEPT)[0], fit(matrix, gram_of(x), KEPT)[0]
    assert error(wanted, unseen, KEPT, repaired) < 0.8 * error(wanted, unseen, KEPT, own)


def test_a_target_of_noise_is_left_alone() -> None:
    """What one half of the text says of the target the other does not: the fit stays with W x."""
    x, unseen, matrix = random(256, 12), random(4000, 12), random(5, 12)
    target = x @ matrix.T + 20 * random(256, 5)
    wanted = unseen @ matrix.T
    own, _ = fit(matrix, gram_of(x), KEPT)
    full = torch.linalg.lstsq(x[:, KEPT], target).solution.T  # what trusting the target would give
    found = error(wanted, unseen, KEPT, fit(matrix, gram_of(x, target), KEPT)[0])
    trusting, careful = error(wanted, unseen, KEPT, full), error(wanted, unseen, KEPT, own)
    assert found - careful < 0.3 * (trusting - careful)


def test_dead_channels_break_nothing() -> None:
    x, matrix = correlated(256, 12), random(4, 12)
    x[:, [1, 4, 6]] = 0
    assert torch.isfinite(fit(matrix, gram_of(x), torch.tensor([0, 1, 4, 6, 7]))[0]).all()


def test_ridges_are_positive_and_what_all_columns_keep_is_not_touched() -> None:
    matrix = random(4, 6)
    torch.testing.assert_close(fit(matrix, gram_of(random(128, 6)), torch.arange(6))[0], matrix.float())
    assert min(RIDGES) > 0


def test_moments_add_up_over_texts() -> None:
    x, target = random(256, 6), random(256, 3)
    both = gram_of(x[:128], target[:128]) + gram_of(x[128:], target[128:])
    torch.testing.assert_close(both.mean(0, 1), moments_of(x.float()).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.cross(0, 1), target.T @ x / 256, rtol=1e-4, atol=1e-5)
