"""The recipe: one object, YAML in and out, every flag a field, all faults in one message."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest

from cusprun import cli
from cusprun.errors import InvalidRequest
from cusprun.formats import types_of
from cusprun.importance import CRITERIA
from cusprun.quants import TYPES
from cusprun.recipe import Quant, Recipe, make_recipe, read_recipe

NOT_FIELDS = {"context", "recipe", "json_"}  # where the wish comes from and how the answer is printed


def test_every_flag_of_build_is_a_field_and_every_field_a_flag() -> None:
    assert set(inspect.signature(cli.build).parameters) - NOT_FIELDS == set(Recipe.model_fields)


def test_every_flag_of_prune_is_a_field() -> None:
    assert set(inspect.signature(cli.prune).parameters) - NOT_FIELDS <= set(Recipe.model_fields)


def test_yaml_gives_the_same_recipe_back(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"lang": "en", "domain": "legal", "corpus": ["a.txt:2"], "ratio": 0.33, "quant": ["q4_0", "f16"], "seed": 3}
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_flags_override_the_file(tmp_path: Path) -> None:
    make_recipe({"lang": "en", "ratio": 0.3}).save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml", {"ratio": 0.4}).ratio == 0.4


def test_unknown_keys_and_impossible_values_are_refused_together() -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_recipe({"lang": "en", "layout": "zigzag", "ratio": -1, "colour": "red", "quant": ["q9"], "combine": "sum"})
    message = str(caught.value)
    for expected in ("'per-layer', 'uniform'", "ratio: -1", "colour: no such field", "'q8_0'", "'mixture'"):
        assert expected in message
    assert "at least 1 item" not in message  # what follows from another fault is not said


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, "much"])
def test_ratios_that_cannot_be(ratio: object) -> None:
    with pytest.raises(InvalidRequest, match="ratio"):
        make_recipe({"lang": "en", "ratio": ratio})


def test_ratio_and_epsilon_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="give one"):
        make_recipe({"lang": "en", "ratio": 0.2, "epsilon": 0.01})


def test_a_scenario_is_needed() -> None:
    with pytest.raises(InvalidRequest, match="at least one of lang, domain, task, corpus, dim"):
        make_recipe({})


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "lang: [", "\x00\x01"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"recipe\.yaml"):
        read_recipe(path)


def test_yaml_tags_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lang: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(InvalidRequest):
        read_recipe(path)
    assert not Path("owned").exists()


def test_methods_of_the_recipe_are_those_of_the_registry_and_refit() -> None:
    names = get_args(Recipe.model_fields["method"].annotation)
    assert set(names) == {criterion.name for criterion in CRITERIA} | {"refit", "slicegpt", "shortgpt"}


@pytest.mark.parametrize("weight", ["domain", "=2", "domain=", "domain=0", "domain=-1", "domain=two", "domain=nan"])
def test_weights_that_are_none(weight: str) -> None:
    with pytest.raises(InvalidRequest, match="NAME=NUMBER"):
        make_recipe({"lang": "en", "weight": [weight]})


def test_what_belongs_to_one_method_alone_is_refused_elsewhere() -> None:
    for wrong in ({"method": "flap", "widths": "even"}, {"method": "shortgpt", "epsilon": 0.1}, {"vocab": "few"}):
        with pytest.raises(InvalidRequest):
            make_recipe({"lang": "en", **wrong})
    assert make_recipe({"lang": "en"}).combined == "mixture"
    assert make_recipe({"lang": "en", "method": "cus-prun"}).combined == "intersection"
    for method in ("flap", "wanda-sp", "llm-pruner", "llm-pruner-mix"):  # their papers score one corpus
        assert make_recipe({"lang": "en", "method": method}).combined == "mixture"
        assert make_recipe({"lang": "en", "method": method, "combine": "max"}).combined == "max"
    assert make_recipe({"lang": "en", "epsilon": 0.1}).cuts_by == "scores"


def test_types_that_a_recipe_takes_are_those_that_are_written() -> None:
    assert get_args(Quant) == (*types_of("gguf"), *types_of("onnx"))
    for name, kind in TYPES.items():
        assert name == "auto" or name.upper() in kind.file_type
