"""Tables of what widths cost: exact where the cost is a sum over layers and rows."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cusprun.additive import FEWER_LAYERS, FEWER_ROWS, WHOLE, Table, variants
from cusprun.anatomy import Anatomy, LayerWidths, describe
from tests import pico


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    folder = pico.save_model(
        tmp_path_factory.mktemp("wide") / "model", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4
    )
    return describe(folder)


def table(anatomy: Anatomy, layers: int | None = None) -> Table:
    shapes = variants(anatomy, align=8, attention_goes=True, rows=anatomy.vocab_size // 4)
    return Table.of(shapes, {name: float(sizes.parameters) for name, sizes in shapes.items()}, layers)


def test_variants_are_narrower_in_one_way_each(anatomy: Anatomy) -> None:
    shapes = variants(anatomy, align=8, attention_goes=True, rows=100)
    assert shapes[WHOLE] == anatomy
    assert len(shapes[FEWER_LAYERS].layers) == 2
    assert shapes[FEWER_ROWS].vocab_size == 100
    assert len(set(shapes.values())) == len(shapes)
    assert all(sizes.parameters < anatomy.parameters for name, sizes in shapes.items() if name != WHOLE)
    assert {sizes.layers[1].kv_heads for sizes in shapes.values()} == {4, 2, 1, 0}
    without = variants(anatomy, align=8, attention_goes=False, rows=anatomy.vocab_size)
    assert all(layer.kv_heads for sizes in without.values() for layer in sizes.layers)
    assert FEWER_ROWS not in without


def test_a_sum_over_parts_is_told_exactly_for_models_that_were_not_measured(anatomy: Anatomy) -> None:
    found = table(anatomy)
    full = anatomy.layers[0]
    layers = [full, LayerWidths(40, 2, 1), None, LayerWidths(104, 0, 0)]
    expert = anatomy.with_layers(layers).with_vocabulary(300)
    assert found.total(anatomy, layers, 300) == pytest.approx(expert.parameters)
    assert found.total(anatomy, anatomy.layers, anatomy.vocab_size) == anatomy.parameters


def test_fewer_layers_stand_for_all(anatomy: Anatomy) -> None:
    """Measured on four layers, told for ten."""
    deep = anatomy.with_layers(anatomy.layers)
    deep = dataclasses.replace(deep, layers=anatomy.layers[:1] * 10, attention=anatomy.attention[:1] * 10)
    layers = [LayerWidths(64, 4, 2)] * 9 + [None]
    assert table(anatomy, layers=10).total(deep, layers, 512) == pytest.approx(
        deep.with_layers(layers).with_vocabulary(512).parameters
    )


def test_noise_does_not_make_narrower_dearer(anatomy: Anatomy) -> None:
    shapes = variants(anatomy, align=8, attention_goes=True, rows=100)
    amounts = dict.fromkeys(shapes, 1.0) | {name: 1.1 for name in shapes if name != WHOLE}
    found = Table.of(shapes, amounts)
    assert found.total(anatomy, [LayerWidths(64, 2, 1)] * 4, 100) == 1.0


def test_json_round_trip(anatomy: Anatomy) -> None:
    found = table(anatomy)
    assert Table.from_json(json.loads(json.dumps(found.to_json()))) == found
