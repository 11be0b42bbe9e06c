"""Widths from measured losses: budgets met, cheap layers cut first, layouts and runtimes' limits held."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.anatomy import Anatomy, LayerWidths, describe
from cusprun.errors import InvalidRequest
from cusprun.program import Choice
from cusprun.sensitivity import LayerSensitivity, ffn_levels, head_levels
from cusprun.widths import RowsChoice, _solve, solve_widths


@pytest.fixture
def anatomy(pico_model: Path) -> Anatomy:
    return describe(pico_model)


def sensitivities(anatomy: Anatomy, prices: list[float], dropped: float = 9.0) -> list[LayerSensitivity]:
    """Losses that grow with what goes, times each layer's price."""
    found = []
    for index, (widths, price) in enumerate(zip(anatomy.layers, prices, strict=True)):
        ffn = {width: price * (1 - width / widths.ffn) for width in ffn_levels(widths, deep=True)}
        heads = {
            width: 2 * price * (1 - width / widths.kv_heads)
            for width in [*head_levels(widths), *([0] if index else [])]
        }
        found.append(LayerSensitivity(ffn, heads, dropped if index else None))
    return found


def share(anatomy: Anatomy, layers: tuple[LayerWidths | None, ...], rows: int | None = None) -> float:
    smaller = anatomy.with_layers(layers)
    if rows is not None:
        smaller = smaller.with_vocabulary(rows)
    return 1 - smaller.parameters / anatomy.parameters


def test_the_cheap_layer_is_cut_and_the_budget_met(anatomy: Anatomy) -> None:
    prices = [1.0, 0.01, 1.0]
    found = solve_widths(anatomy, sensitivities(anatomy, prices), 0.06 * anatomy.parameters, align=1)
    assert 0.06 <= share(anatomy, found.layers) <= 0.0625
    assert found.layers[0] == anatomy.layers[0]
    assert found.layers[2] == anatomy.layers[2]
    assert found.layers[1] != anatomy.layers[1]
    assert found.predicted > 0
    assert found.rows is None


def test_a_layer_that_costs_nothing_goes_whole_but_not_the_first(anatomy: Anatomy) -> None:
    target = anatomy.parameters - anatomy.with_layers((None, *anatomy.layers[1:])).parameters
    found = solve_widths(anatomy, sensitivities(anatomy, [1.0, 1.0, 1.0], dropped=0.0), target, align=8)
    assert found.layers[0] == anatomy.layers[0]
    assert found.layers.count(None) == 1
    assert found.predicted == 0


def test_attention_blocks_compete(anatomy: Anatomy) -> None:
    layers = sensitivities(anatomy, [1.0, 1.0, 1.0])
    layers[2] = LayerSensitivity(layers[2].ffn, dict.fromkeys(layers[2].kv_heads, 0.0), 9.0)
    target = anatomy.layer_parameters(anatomy.layers[2]) - anatomy.layer_parameters(
        LayerWidths(anatomy.layers[2].ffn, 0, 0)
    )
    found = solve_widths(anatomy, layers, target, align=8)
    assert found.layers[2] == LayerWidths(anatomy.layers[2].ffn, 0, 0)


def test_uniform_gives_one_width(anatomy: Anatomy) -> None:
    found = solve_widths(
        anatomy, sensitivities(anatomy, [1.0, 0.01, 1.0]), 0.1 * anatomy.parameters, align=1, uniform=True
    )
    assert len(set(found.layers)) == 1
    assert 0.1 <= share(anatomy, found.layers) <= 0.1025


@pytest.mark.parametrize("align", [8, 16])
def test_widths_that_are_cut_are_aligned(anatomy: Anatomy, align: int) -> None:
    layers = sensitivities(anatomy, [1.0, 0.3, 0.6])
    for target in (0.05, 0.1, 0.15):
        found = solve_widths(anatomy, layers, target * anatomy.parameters, align=align)
        cut = [now.ffn for now, full in zip(found.layers, anatomy.layers, strict=True) if now and now.ffn < full.ffn]
        assert cut
        assert all(width % align == 0 for width in cut)
        assert share(anatomy, found.layers) == pytest.approx(target, abs=0.01)


def test_less_goes_where_nothing_comes_as_near_from_above() -> None:
    groups = [[Choice(0.0, (0.0,)), Choice(1.0, (98.0,)), Choice(3.0, (130.0,))]]
    assert _solve(groups, 100, 1000) == [1]  # 2 short is within 0.25 % of 1000, 30 over is within 3 % alone
    assert _solve(groups, 98, 1000) == [1]


def test_rows_compete_at_their_price(anatomy: Anatomy) -> None:
    layers = sensitivities(anatomy, [1.0, 1.0, 1.0])
    rows = [RowsChoice(anatomy.vocab_size, 0.0), RowsChoice(anatomy.vocab_size // 2, 1e-6)]
    target = anatomy.parameters - anatomy.with_vocabulary(rows[1].rows).parameters
    found = solve_widths(anatomy, layers, target, align=8, rows=rows)
    assert found.rows == rows[1].rows
    assert found.layers == anatomy.layers
    dear = [rows[0], RowsChoice(rows[1].rows, 100.0)]
    kept = solve_widths(anatomy, layers, 0.05 * anatomy.parameters, align=1, rows=dear)
    assert kept.rows == anatomy.vocab_size


def test_what_is_too_much_is_refused(anatomy: Anatomy) -> None:
    with pytest.raises(InvalidRequest, match="no choice of widths"):
        solve_widths(anatomy, sensitivities(anatomy, [1.0, 1.0, 1.0]), 0.99 * anatomy.parameters, align=8)


def test_widths_below_the_narrowest_measured_are_not_offered(anatomy: Anatomy) -> None:
    half = anatomy.layers[0].ffn // 2
    layers = [LayerSensitivity({half: 0.0}, {}, None) for _ in anatomy.layers]
    everything = 3 * half * anatomy.ffn_unit_parameters()
    found = solve_widths(anatomy, layers, everything, align=8)
    assert [layer.ffn for layer in found.layers if layer is not None] == [half] * 3
    with pytest.raises(InvalidRequest, match="no choice of widths"):
        solve_widths(anatomy, layers, 1.5 * everything, align=8)


def test_json_round_trip(anatomy: Anatomy) -> None:
    for layer in sensitivities(anatomy, [1.0, 0.2, 0.3]):
        assert LayerSensitivity.from_json(layer.to_json()) == layer


def test_the_end_that_rarely_binds_still_holds() -> None:
    """The least loss for the lower end alone removes far too much here: the other group goes instead."""
    groups = [[Choice(0.0, (0.0,)), Choice(1.0, (100.0,))], [Choice(0.0, (0.0,)), Choice(2.0, (60.0,))]]
    assert _solve(groups, 60, 2000) == [0, 1]  # within 5 either way
    assert _solve(groups, 100, 2000) == [1, 0]
