"""Gauss-Newton on gate and up: derivatives are those of autograd, a narrowed FFN gets nearer on text it did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch.func import jvp, vjp

from cusprun import arithmetic, gauss_newton, joint
from cusprun.gauss_newton import DAMPING, GatedFfn, Step, Windows, _Problem, improve, judged
from cusprun.joint import fit_jointly

HIDDEN, CHANNELS, TOKENS = 12, 32, 48
Activation = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ffn_of(channels: int, activation: Activation = torch.nn.functional.silu, *, biased: bool = False) -> GatedFfn:
    gate, up = random(channels, HIDDEN, seed=1), random(channels, HIDDEN, seed=2)
    biases = (random(channels, seed=3), random(channels, seed=4)) if biased else (None, None)
    return GatedFfn(gate, up, random(HIDDEN, channels, seed=5), *biases, activation)


def narrowed(ffn: GatedFfn, kept: int) -> GatedFfn:
    """The first channels, with a down that makes up for the others on many tokens."""
    part = replace(ffn, gate=ffn.gate[:kept], up=ffn.up[:kept])
    x = random(4096, HIDDEN, seed=9)
    return replace(part, down=torch.linalg.lstsq(part.inner(x), ffn(x)).solution.T.contiguous())


def windows_of(teacher: GatedFfn, seeds: range, noise: float = 0.0) -> Callable[[], Iterator[Windows]]:
    """Batches of eight windows with what the teacher gives for them."""

    def batches() -> Iterator[Windows]:
        for seed in seeds:
            x = random(8, TOKENS, HIDDEN, seed=100 + seed)
            targets = teacher(x.flatten(0, 1)) + noise * random(8 * TOKENS, HIDDEN, seed=200 + seed)
            yield Windows(x, targets.view(8, TOKENS, HIDDEN), torch.ones(8, TOKENS, 1))

    return batches


def error(ffn: GatedFfn, batches: Callable[[], Iterator[Windows]]) -> float:
    return sum(
        float((each.targets.flatten(0, 1) - ffn(each.states.flatten(0, 1))).square().sum()) for each in batches()
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "activation", [torch.nn.functional.silu, lambda x: torch.nn.functional.gelu(x, approximate="tanh")]
)
def test_right_side_and_curvature_are_those_of_autograd(activation: Activation, biased: bool) -> None:
    teacher = ffn_of(CHANNELS, activation, biased=biased)
    ffn = ffn_of(20, activation, biased=biased)

    def batches() -> Iterator[Windows]:
        for number, each in enumerate(windows_of(teacher, range(2))()):
            yield replace(each, scales=random(*each.scales.shape, seed=300 + number).sigmoid())

    problem = _Problem(ffn, batches)
    fitted = [each.tokens(slice(7)) for each in batches()]  # the eighth window of each batch judges
    x, targets, scales = (torch.cat(parts) for parts in zip(*fitted, strict=True))

    def outputs(up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return replace(ffn, up=up, gate=gate)(x)

    given, pull = vjp(outputs, ffn.up, ffn.gate)
    right = pull((targets - given) * scales**2)
    way = Step(random(20, HIDDEN, seed=7), random(20, HIDDEN, seed=8))
    _, change = jvp(outputs, (ffn.up, ffn.gate), (way.up, way.gate))
    bent = pull(change * scales**2)
    found = problem.curvature(way)
    eased = problem.precondition(way)
    for name, one, other in (("up", *right[:1], *bent[:1]), ("gate", *right[1:], *bent[1:])):
        torch.testing.assert_close(getattr(problem.right, name), one, rtol=1e-3, atol=1e-2)
        scale, along = getattr(problem.scale, name), getattr(way, name)
        damping = DAMPING * scale * (along @ problem.inputs)
        torch.testing.assert_close(getattr(found, name) - damping, other, rtol=1e-3, atol=1e-1)
        torch.testing.assert_close(scale * (getattr(eased, name) @ problem.inputs), along, rtol=1e-3, atol=1e-3)


def test_enough_iterations_solve_the_damped_equations() -> None:
    ffn, batches = ffn_of(6), windows_of(ffn_of(CHANNELS), range(2))
    for step in gauss_newton._steps(ffn, batches, 400):
        last = step
    problem = _Problem(ffn, batches)
    bent = problem.curvature(last)
    rest = problem.right.plus(bent, -1.0)
    assert rest.dot(rest) < 1e-4 * problem.right.dot(problem.right)


def test_a_narrowed_ffn_gets_nearer_on_text_that_it_did_not_see() -> None:
    teacher = ffn_of(CHANNELS)
    ffn, seen, unseen = narrowed(teacher, 20), windows_of(teacher, range(8)), windows_of(teacher, range(50, 54))
    stepped, whole = improve(ffn, seen), fit_jointly(ffn, seen)
    assert error(stepped, unseen) < 0.9 * error(ffn, unseen)
    assert error(whole, unseen) < error(stepped, unseen)
    assert judged(whole, seen) < judged(ffn, seen)


def test_noise_is_not_learnt() -> None:
    """Two batches whose targets are mostly noise: further steps would fit that."""
    teacher = ffn_of(CHANNELS)
    ffn, unseen = narrowed(teacher, 30), windows_of(teacher, range(50, 54))
    found = fit_jointly(ffn, windows_of(teacher, range(2), noise=200.0))
    assert error(found, unseen) < 1.5 * error(ffn, unseen)
    many = list(gauss_newton._steps(ffn, windows_of(teacher, range(2), noise=200.0), 40))
    assert error(ffn.moved(many[-1]), unseen) > 3 * error(ffn, unseen)


def test_tokens_whose_error_counts_nothing_move_nothing() -> None:
    """Every other token is told to give something wild: where that counts, it spoils the others."""
    teacher = ffn_of(CHANNELS)
    ffn, unseen = narrowed(teacher, 20), windows_of(teacher, range(50, 54))

    def spoilt(scale: float) -> Callable[[], Iterator[Windows]]:
        def batches() -> Iterator[Windows]:
            for number, each in enumerate(windows_of(teacher, range(8))()):
                targets, scales = each.targets.clone(), each.scales.clone()
                targets[:, ::2] += 300.0 * random(*targets[:, ::2].shape, seed=number)
                scales[:, ::2] = scale
                yield Windows(each.states, targets, scales)

        return batches

    clean = error(fit_jointly(ffn, windows_of(teacher, range(8))), unseen)
    heard, unheard = (error(fit_jointly(ffn, spoilt(scale)), unseen) for scale in (1.0, 0.0))
    assert unheard < 1.1 * clean
    assert heard > 1.3 * clean


def test_it_stays_as_it_is_where_nothing_can_be_judged_or_gained() -> None:
    teacher = ffn_of(CHANNELS)

    def single() -> Iterator[Windows]:
        for each in windows_of(teacher, range(3))():
            yield Windows(each.states[:1], each.targets[:1], each.scales[:1])

    ffn = narrowed(teacher, 20)
    assert fit_jointly(ffn, single) is ffn  # three windows: none judges
    assert fit_jointly(teacher, windows_of(teacher, range(2))) is teacher  # it gives what is wanted


def test_batches_of_one_window_take_the_step_too() -> None:
    teacher = ffn_of(CHANNELS)
    ffn, unseen = narrowed(teacher, 20), windows_of(teacher, range(50, 54))

    def single() -> Iterator[Windows]:
        for each in windows_of(teacher, range(6))():
            for number in range(8):
                some = slice(number, number + 1)
                yield Windows(each.states[some], each.targets[some], each.scales[some])

    assert error(improve(ffn, single), unseen) < 0.95 * error(ffn, unseen)


def test_much_text_is_thinned_for_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = ffn_of(CHANNELS)
    ffn, seen = narrowed(teacher, 20), windows_of(teacher, range(8))
    monkeypatch.setattr(joint, "STEP_TOKENS", 2 * 8 * TOKENS)  # two batches of eight, every fourth
    assert [float(each.states[0, 0, 0]) for each in joint._thinned(seen)()] == [
        float(random(8, TOKENS, HIDDEN, seed=100 + seed)[0, 0, 0]) for seed in (0, 4)
    ]
    found = fit_jointly(ffn, seen)
    assert torch.equal(found.gate, improve(ffn, joint._thinned(seen)).gate)
    assert error(found, windows_of(teacher, range(50, 54))) < error(ffn, windows_of(teacher, range(50, 54)))


def test_rounded_products_find_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = ffn_of(CHANNELS)
    ffn, seen, unseen = narrowed(teacher, 20), windows_of(teacher, range(8)), windows_of(teacher, range(50, 54))
    exactly = error(fit_jointly(ffn, seen), unseen)
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: True)  # right everywhere, if not fast
    found = fit_jointly(ffn, seen)
    monkeypatch.setattr(arithmetic, "has_bfloat16_units", lambda: False)
    assert error(found, unseen) == pytest.approx(exactly, rel=0.02)


def test_factors_that_are_not_held_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = ffn_of(CHANNELS)
    ffn, batches = narrowed(teacher, 20), windows_of(teacher, range(4))
    held = improve(ffn, batches)
    monkeypatch.setattr(gauss_newton, "HELD_BYTES", 7 * TOKENS * (HIDDEN + 2 * 20) * 4 + 1)  # the first batch's
    again = improve(ffn, batches)
    assert torch.equal(held.gate, again.gate)
    assert torch.equal(held.up, again.up)


def test_dead_channels_break_nothing() -> None:
    teacher = ffn_of(CHANNELS)
    ffn = narrowed(teacher, 20)
    ffn.gate[3], ffn.up[3], ffn.down[:, 4] = 0.0, 0.0, 0.0
    found = fit_jointly(ffn, windows_of(teacher, range(4)))
    assert all(torch.isfinite(each).all() for each in (found.gate, found.up, found.down))
