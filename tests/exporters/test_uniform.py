"""Layers of different widths filled up to one: the same logits from a stock architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cusprun.anatomy import describe
from cusprun.checkpoint import load_model
from cusprun.compact import compact
from cusprun.errors import InvalidRequest
from cusprun.exporters.uniform import fill_up
from cusprun.plan import LayerPlan, make_plan
from tests import pico


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_filled_up_layers_add_nothing(tmp_path: Path, family: str) -> None:
    dense = pico.save_model(tmp_path / "dense", family)
    kept = (LayerPlan(tuple(range(96)), (0, 1)), LayerPlan(tuple(range(32)), ()), LayerPlan(tuple(range(64)), (1,)))
    compact(dense, make_plan(describe(dense), kept), tmp_path / "narrow")
    fill_up(tmp_path / "narrow", tmp_path / "filled")
    assert json.loads((tmp_path / "filled" / "config.json").read_text())["model_type"] == family
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        narrow, filled = (load_model(tmp_path / name)(ids).logits for name in ("narrow", "filled"))
    torch.testing.assert_close(filled, narrow, atol=1e-5, rtol=0)


def test_groups_of_another_size_cannot_be_filled_up(tmp_path: Path) -> None:
    dense = pico.save_model(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "model_type": "cusprun_llama", "layer_intermediate_sizes": [128] * 3, "layer_num_attention_heads": [4, 2, 4],
        "layer_num_key_value_heads": [2, 2, 2],
    }  # fmt: skip
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match=r"differ from layer to layer: \[1, 2\]"):
        fill_up(dense, tmp_path / "filled")
    assert not (tmp_path / "filled").exists()
