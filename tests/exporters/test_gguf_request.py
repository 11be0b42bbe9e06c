"""`cusprun-edge export` as a whole: what it checks before it works, what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import gguf_request
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.gguf_request import export_folder
from cusprun.exporters.imatrix import collect_imatrix
from cusprun.exporters.imatrix_file import read_imatrix, write_imatrix
from tests.exporters.models import make, windows
from tests.exporters.test_gguf import rewrite
from tests.pico import SENTENCES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "pico")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES * 60))
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant": "q3"}, "'q3' is unknown"),
        ({"quant": "q4_0", "tensor_types": ["attn_v"]}, "write REGEX=TYPE"),
        ({"quant": "q4_0", "tensor_types": ["nothing=q8_0"]}, "no matrix has such a name"),
        ({"quant": "f16", "tensor_types": ["attn_v=q8_0"]}, "written without it"),
        ({"quant": "q8_0"}, "rounded the same"),
        ({"quant": "q4_0", "imatrix": Path("x.imatrix")}, "give one"),
    ],
)
def test_wrong_requests_end_before_the_importance_matrix_is_taken(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(gguf_request, "imatrix_of_text", lambda *_: pytest.fail("the importance matrix was taken"))
    with pytest.raises(InvalidRequest, match=message):
        export_folder(folder, tmp_path / "out" / "x.gguf", corpus=corpus, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.gguf", "x.imatrix"])
def test_nothing_is_overwritten(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(gguf_request, "imatrix_of_text", lambda *_: pytest.fail("the importance matrix was taken"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidRequest, match=f"{name} exists"):
        export_folder(folder, tmp_path / "x.gguf", "q4_0", corpus=corpus)
    assert (tmp_path / name).read_text() == "mine"


def test_the_importance_matrix_of_a_text_lies_beside_the_file(folder: Path, corpus: Path, tmp_path: Path) -> None:
    report = export_folder(folder, tmp_path / "out", "q4_0", corpus=corpus, tokens=2048)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pico-q4_0.gguf", "pico-q4_0.imatrix"]
    again = export_gguf(
        folder, tmp_path / "again.gguf", "q4_0", name="pico", imatrix=tmp_path / "out" / "pico-q4_0.imatrix"
    )
    assert again.sha256 == report.sha256


def test_a_failed_export_leaves_no_importance_matrix(folder: Path, corpus: Path, tmp_path: Path) -> None:
    import torch

    rewrite(folder, "model.norm.weight", torch.full((64,), float("nan")))
    with pytest.raises(Failed, match=r"model\.norm\.weight"):
        export_folder(folder, tmp_path / "out" / "x.gguf", "q4_0", corpus=corpus, tokens=2048)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_importance_matrix_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", hidden_size=96)
    write_imatrix(tmp_path / "x.imatrix", collect_imatrix(other, {"text": windows(other)}), ["text"])
    with pytest.raises(InvalidRequest, match="96 columns there and 64 here"):
        export_folder(folder, tmp_path / "out" / "x.gguf", "q4_0", imatrix=tmp_path / "x.imatrix")
    assert not (tmp_path / "out").exists()


def test_two_bits_need_every_matrix(folder: Path, tmp_path: Path) -> None:
    found = collect_imatrix(folder, {"text": windows(folder)})
    part = {name: values for name, values in found.sums.items() if "attn_v" not in name}
    write_imatrix(tmp_path / "x.imatrix", type(found)(part, found.tokens, found.window), ["text"])
    assert len(read_imatrix(tmp_path / "x.imatrix")) == len(part)
    with pytest.raises(InvalidRequest, match=r"lacks blk\.0\.attn_v\.weight"):
        export_folder(folder, tmp_path / "y.gguf", "iq2_m", imatrix=tmp_path / "x.imatrix")
