"""Budgets of a device: met, at the least loss over all types, and where they cannot be met with what can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from cusprun.additive import Table, variants
from cusprun.anatomy import Anatomy, describe
from cusprun.budget import Budget, parse_bytes
from cusprun.errors import InvalidRequest
from cusprun.sensitivity import LayerSensitivity
from cusprun.solver import TypeOffer, solve_budget
from cusprun.widths import RowsChoice, Widths
from tests.test_widths import sensitivities


@pytest.fixture
def anatomy(pico_model: Path) -> Anatomy:
    return describe(pico_model)


@pytest.fixture
def layers(anatomy: Anatomy) -> list[LayerSensitivity]:
    return sensitivities(anatomy, [1.0, 0.1, 0.5])


def offer(anatomy: Anatomy, quant: str, width: float, rounding: Callable[[], float] | float) -> TypeOffer:
    """A type that takes ``width`` bytes a parameter, and time and memory in proportion to them."""
    shapes = variants(anatomy, align=8, attention_goes=True, rows=128)

    def of(factor: float) -> Table:
        return Table.of(shapes, {name: factor * width * sizes.parameters for name, sizes in shapes.items()})

    measure = rounding if callable(rounding) else lambda: rounding
    return TypeOffer(quant, measure, of(1.0), of(1e-9), of(2.0))


def weigh(anatomy: Anatomy, widths: Widths) -> int:
    return anatomy.with_layers(widths.layers).parameters


def test_sizes_are_read() -> None:
    assert parse_bytes("60MB") == 60_000_000
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes("500k") == 500_000
    assert parse_bytes("2G") == 2 * 10**9  # as gguf-split counts
    for wrong in ("", "MB", "60 parsecs", "-5MB", "0MB", "0.5B", "1e3MB", "9" * 300 + "G"):
        with pytest.raises(ValueError, match="write a number with KB, MB"):
            parse_bytes(wrong)


def test_each_wish_is_met_and_nearly_used_up(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    dense = anatomy.parameters
    one = offer(anatomy, "q8_0", 1.0, 0.0)
    for budget in (
        Budget(size=int(0.9 * dense)),
        Budget(ram=int(2 * 0.9 * dense)),
        Budget(speedup=1 / 0.9),
        Budget(tps=1e9 / (0.9 * dense)),
        Budget(size=dense, tps=1e9 / (0.9 * dense)),
    ):
        found = solve_budget(anatomy, layers, budget, [one], align=1)
        assert 0.895 * dense <= weigh(anatomy, found.widths) <= 0.9 * dense, budget
        assert found.expected["file_bytes"] == pytest.approx(weigh(anatomy, found.widths))
        assert found.expected["speedup"] == pytest.approx(dense / weigh(anatomy, found.widths))
        assert found.widths.layers[0] == anatomy.layers[0]  # the dear one


def test_the_type_and_the_cut_are_weighed_against_each_other(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    dense = anatomy.parameters
    wide, narrow = offer(anatomy, "q8_0", 1.0, 0.0), offer(anatomy, "q4_0", 0.5, 0.02)
    assert solve_budget(anatomy, layers, Budget(size=dense), [wide, narrow], align=1).quant == "q8_0"
    small = solve_budget(anatomy, layers, Budget(size=int(0.85 * dense)), [wide, narrow], align=1)
    assert small.quant == "q4_0"
    assert small.widths.predicted == 0
    assert small.rounding == 0.02
    assert small.loss == pytest.approx(0.02)


def test_rounding_is_measured_only_where_it_can_matter(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    """With room for all of it in four bits, what eight bits lose at that size is more before they are measured."""

    def never() -> float:
        raise AssertionError("measured")

    offers = [offer(anatomy, "q8_0", 1.0, never), offer(anatomy, "q4_0", 0.5, 0.001)]
    found = solve_budget(anatomy, layers, Budget(size=int(0.85 * anatomy.parameters)), offers, align=1)
    assert found.quant == "q4_0"


def test_what_costs_nothing_stays(anatomy: Anatomy) -> None:
    free = sensitivities(anatomy, [0.0, 0.0, 0.0], dropped=0.0)
    size = int(0.9 * anatomy.parameters)
    found = solve_budget(anatomy, free, Budget(size=size), [offer(anatomy, "q8_0", 1.0, 0.0)], align=1)
    assert 0.99 * size <= weigh(anatomy, found.widths) <= size


def test_rows_compete(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    rows = [RowsChoice(anatomy.vocab_size, 0.0), RowsChoice(anatomy.vocab_size // 2, 1e-6)]
    size = anatomy.with_vocabulary(rows[1].rows).parameters + 200
    found = solve_budget(anatomy, layers, Budget(size=size), [offer(anatomy, "q8_0", 1.0, 0.0)], align=8, rows=rows)
    assert found.widths.rows == rows[1].rows
    assert found.widths.layers == anatomy.layers


def test_a_file_larger_than_the_tables_say_is_cut_further(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    """The exact size counts: here it has a header that the tables know nothing of."""
    wish, header = int(0.9 * anatomy.parameters), 0.03 * anatomy.parameters

    def measure(quant: str, widths: Widths) -> int:
        return int(weigh(anatomy, widths) + header)

    found = solve_budget(
        anatomy, layers, Budget(size=wish), [offer(anatomy, "q8_0", 1.0, 0.0)], align=1, measure_bytes=measure
    )
    assert measure("q8_0", found.widths) <= wish
    assert measure("q8_0", found.widths) >= 0.995 * wish
    assert found.expected["file_bytes"] == measure("q8_0", found.widths)


@pytest.mark.parametrize("header", [0.05, -0.02])
def test_what_is_offered_can_be_had(anatomy: Anatomy, layers: list[LayerSensitivity], header: float) -> None:
    """Where files are larger than the tables say, or smaller: the size that is named is one that a build keeps to."""

    def measure(quant: str, widths: Widths) -> int:
        return int(weigh(anatomy, widths) + header * anatomy.parameters)

    offers = [offer(anatomy, "q8_0", 1.0, 0.0)]
    with pytest.raises(InvalidRequest, match="the nearest is --size") as error:
        solve_budget(anatomy, layers, Budget(size=1000), offers, align=8, measure_bytes=measure)
    nearest = parse_bytes(str(error.value).split("--size ")[2].split()[0])
    found = solve_budget(anatomy, layers, Budget(size=nearest), offers, align=8, measure_bytes=measure)
    assert measure("q8_0", found.widths) <= nearest


def test_what_cannot_be_is_refused_with_the_nearest_that_can(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    offers = [offer(anatomy, "q8_0", 1.0, 0.0), offer(anatomy, "q4_0", 0.5, 0.1)]
    with pytest.raises(InvalidRequest, match=r"meets --size 1KB; the nearest is --size [0-9.]+KB in q4_0$") as error:
        solve_budget(anatomy, layers, Budget(size=1000), offers, align=8)
    nearest = parse_bytes(str(error.value).split("--size ")[2].split()[0])
    assert solve_budget(anatomy, layers, Budget(size=nearest), offers, align=8).quant == "q4_0"
    with pytest.raises(InvalidRequest, match=r"by itself each reaches --size .* --tps ") as error:
        solve_budget(anatomy, layers, Budget(size=1000, tps=1e9), offers, align=8)
    tps = float(str(error.value).rsplit("--tps ", 1)[1])
    solve_budget(anatomy, layers, Budget(tps=tps), offers, align=8)


def test_one_width_for_all_layers(anatomy: Anatomy, layers: list[LayerSensitivity]) -> None:
    budget = Budget(size=int(0.85 * anatomy.parameters))
    found = solve_budget(anatomy, layers, budget, [offer(anatomy, "q8_0", 1.0, 0.0)], align=1, uniform=True)
    assert len(set(found.widths.layers)) == 1
    assert weigh(anatomy, found.widths) <= 0.85 * anatomy.parameters


def test_budget_as_words() -> None:
    assert Budget(size=60_000_000, speedup=1.5).words() == "--size 60MB --speedup 1.5"
    assert not Budget()
    assert Budget(ram=1).timed
    assert not Budget(size=1).timed
    assert dataclasses.replace(Budget(), tps=80.0).words() == "--tps 80"
