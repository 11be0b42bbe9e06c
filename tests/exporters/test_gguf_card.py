"""What a model card gives to the file, and that nothing in it is trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.exporters.gguf_card import LONGEST_CARD, read_card
from cusprun.exporters.gguf_request import export_folder
from cusprun.runtimes.gguf_header import load_metadata
from tests.exporters.models import make

CARD = """---
license: other
license_name: pico-licence
license_link: https://example.org/licence
language:
- en
- no
tags: [legal, "a, b"]
pipeline_tag: text-generation
base_model: owner/Pico-Base
datasets:
- owner/texts
- https://example.org/data/more
---
# Pico
"""


def test_the_card_stands_in_the_file_as_gguf_names_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "pico", num_hidden_layers=1)
    (folder / "README.md").write_text(CARD)
    found = load_metadata(export_folder(folder, tmp_path / "x.gguf", "f16").path).metadata  # type: ignore[union-attr]
    expected = {
        "general.license": "other",
        "general.license.name": "pico-licence",
        "general.license.link": "https://example.org/licence",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Pico-Base",
        "general.base_model.0.organization": "owner",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/Pico-Base",
        "general.dataset.count": 2,
        "general.dataset.0.name": "texts",
        "general.dataset.0.organization": "owner",
        "general.dataset.0.repo_url": "https://huggingface.co/datasets/owner/texts",
        "general.dataset.1.name": "more",
        "general.dataset.1.repo_url": "https://example.org/data/more",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["general.languages"] == ["en", "no"]
    assert found["general.tags"] == ["legal", "a, b", "text-generation"]
    assert "general.dataset.1.organization" not in found


@pytest.mark.parametrize(
    "value",
    ["{a: b}", "[[en]]", f"[{', '.join(['en'] * 65)}]", "x" * 257, '"a\\nb"', '"a\\u0000b"', "[{name: en}]"],
)
def test_values_of_another_form_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: {value}\nlicense: mit\n---\n")
    assert read_card(tmp_path) == {"license": "mit"}
    assert capsys.readouterr().err.count("language is left out") == 1


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\n- a\n- b\n---\n", "no YAML mapping"),
        ("---\n" + "[" * 50_000 + "\n---\n", "no YAML mapping"),
        ("---\nlicense: [\n---\n", "no YAML mapping"),
        ("---\nlicense: mit\n" + "#" * LONGEST_CARD + "\n---\n", "does not end"),
        ("---\nlicense: mit\n", "does not end"),
        ("# no front matter\n", ""),
        ("", ""),
    ],
)
def test_cards_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str, said: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_card(tmp_path) == {}
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == (1 if said else 0)
