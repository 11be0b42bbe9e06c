"""The table of layouts: what is chosen, what is refused before any work, and whole builds that keep to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cusprun.anatomy import FAMILIES, Anatomy, LayerAttention, LayerWidths, describe
from cusprun.build import build
from cusprun.cli import app
from cusprun.errors import InvalidRequest
from cusprun.layouts import GGUF, Layout, choose_limits, find_host
from cusprun.preflight import prepare
from cusprun.recipe import make_recipe
from cusprun.runtimes.gguf_header import load_metadata
from cusprun.sensitivity import LayerSensitivity
from tests import pico

SETTINGS: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 5},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7},
}


def anatomy_of(family: str, **changes: Any) -> Anatomy:
    (found,) = (each for each in FAMILIES if each.name == family)
    attention = tuple(LayerAttention(family != "smollm3" or (index + 1) % 4 != 0) for index in range(4))
    whole = Anatomy(found, 64, 16, 512, (LayerWidths(128, 4, 2),) * 4, True, False, False, attention)
    return replace(whole, **changes)


def test_every_family_has_a_uniform_architecture() -> None:
    assert all("uniform" in GGUF[family.name] for family in FAMILIES)


@pytest.mark.parametrize(
    ("family", "changes", "wish", "layout", "noted"),
    [
        ("llama", {}, None, "per-layer", False),
        ("mistral", {"tied": False}, None, "per-layer", False),
        ("llama", {}, "uniform", "uniform", False),
        ("qwen3", {}, None, "per-layer", False),
        ("qwen3", {"tied": False}, None, "uniform", True),
        ("qwen3", {"tied": False}, "uniform", "uniform", False),
        ("smollm3", {}, None, "uniform", True),
    ],
)
def test_by_layer_wherever_that_is_held(
    family: str, changes: dict[str, Any], wish: Layout | None, layout: Layout, noted: bool
) -> None:
    for export in (True, False):
        found = choose_limits(anatomy_of(family, **changes), wish, export=export)
        assert found.layout == layout
        assert bool(found.note) == noted


def test_openelm_and_smollm3_keep_what_they_cannot_lack() -> None:
    deci, openelm = (choose_limits(anatomy_of(name), None, export=True) for name in ("llama", "qwen3"))
    assert (deci.attention_goes, deci.layers_go) == (True, True)
    assert (openelm.attention_goes, openelm.layers_go) == (False, True)
    assert not choose_limits(anatomy_of("smollm3"), None, export=True).layers_go
    cut = LayerSensitivity({64: 0.1}, {1: 0.1, 0: 0.2}, 0.3)
    assert cut.within(attention_goes=False, layers_go=True) == LayerSensitivity({64: 0.1}, {1: 0.1}, 0.3)
    assert cut.within(attention_goes=True, layers_go=False) == LayerSensitivity({64: 0.1}, {1: 0.1, 0: 0.2}, None)


@pytest.mark.parametrize(("family", "changes"), [("smollm3", {}), ("qwen3", {"tied": False})])
def test_a_wish_that_no_export_holds(family: str, changes: dict[str, Any]) -> None:
    anatomy = anatomy_of(family, **changes)
    with pytest.raises(InvalidRequest, match=f"tied {family} with widths of its own.*write --layout uniform, or stop"):
        choose_limits(anatomy, "per-layer", export=True)
    assert choose_limits(anatomy, "per-layer", export=False).layout == "per-layer"  # torch computes it


def test_a_dense_model_that_no_architecture_holds_is_not_pruned_for_one() -> None:
    odd = anatomy_of("smollm3", attention=(LayerAttention(),) * 4)
    for check in (find_host, lambda anatomy: choose_limits(anatomy, None, export=True)):
        with pytest.raises(InvalidRequest, match="layers without rotation are others than every fourth"):
            check(odd)
    assert choose_limits(odd, "uniform", export=False).layout == "uniform"


def recipe_of(folder: Path, text: Path, out: Path, **fields: Any) -> Any:
    settings = {"tokens": 2048, "window": 64, "align": 8, "quant": ("f32",), "measure": False, "vocab": "keep"}
    return make_recipe({"model": str(folder), "corpus": (str(text),), "out": out, **settings, **fields})


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("smollm3", {"layout": "per-layer"}, "write --layout uniform, or stop at the model folder"),
        ("smollm3", {"method": "shortgpt"}, "shortgpt removes whole layers, and llama.cpp tells those of smollm3"),
        ("smollm3", {"method": "llm-pruner"}, "llm-pruner keeps some layers whole, but llama.cpp has no architecture"),
        ("gemma3_text", {"method": "shortgpt"}, "shortgpt removes whole layers, and llama.cpp tells those of gemma3"),
        ("qwen3", {"method": "flap"}, "flap adds biases, which llama.cpp's qwen3 has not"),
        ("qwen3", {"method": "slicegpt"}, "slicegpt is not described for qwen3: it slices llama, mistral"),
    ],
)
def test_refused_before_any_work(
    tmp_path: Path, own_text: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    folder = pico.save_model(tmp_path / "model", family, **SETTINGS.get(family, {}))
    recipe = recipe_of(folder, own_text, tmp_path / "out", **fields)
    with pytest.raises(InvalidRequest, match=message):
        prepare(recipe)
    assert not (tmp_path / "out").exists()
    if fields.get("method") != "slicegpt":
        prepare(recipe, artifacts=False)  # the model folder alone holds it


@pytest.mark.parametrize("method", ["refit", "cus-prun", "magnitude"])
@pytest.mark.parametrize(
    ("family", "arch"), [("qwen3", "openelm"), ("smollm3", "smollm3"), ("gemma2", "gemma2"), ("gemma3_text", "gemma3")]
)
def test_a_build_ends_in_a_file_that_llama_cpp_loads(
    tmp_path: Path, own_text: Path, family: str, arch: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pico.save_model(tmp_path / "model", family, **SETTINGS.get(family, {}))
    ratio = 0.3 if method == "refit" else 0.2
    expert = build(recipe_of(folder, own_text, tmp_path / "out", method=method, ratio=ratio))
    (artifact,) = expert["artifacts"]
    assert artifact["arch"] == find_host(describe(tmp_path / "out" / "model")).arch
    assert artifact["arch"] == arch or method != "refit"  # scores may end in equal widths here
    assert artifact["proof"]["kld_mean"] <= 1e-4
    assert artifact["proof"]["top1_agreement"] >= (0.99 if family.startswith("gemma") else 0.999)
    anatomy, info = describe(tmp_path / "out" / "model"), load_metadata(tmp_path / "out" / artifact["path"])
    assert anatomy.layers == info.layers
    assert anatomy.parameters < describe(folder).parameters
    noted = f"layout    llama.cpp has no architecture for tied {family}" in capsys.readouterr().err
    assert noted == (family != "qwen3")
    assert expert["method"]["layout"] == ("uniform" if noted else "per-layer")


def test_inspect_tells_units_and_exports(tmp_path: Path) -> None:
    folder = pico.save_model(tmp_path / "model", "smollm3", num_hidden_layers=5)
    done = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    found = json.loads(done.stdout)
    assert found["exports"]["gguf"] == {"uniform": "smollm3", "per-layer": None}
    assert [layer["rotates"] for layer in found["layers"]] == [True, True, True, False, True]
    assert "kv group" in found["units"]
    lines = CliRunner().invoke(app, ["inspect", str(folder)]).stdout.splitlines()
    assert "gguf             uniform: smollm3" in lines
    assert [line for line in lines if "no rotation" in line] == [
        "layer   3        ffn    128   heads   4   kv heads   2   no rotation"
    ]
