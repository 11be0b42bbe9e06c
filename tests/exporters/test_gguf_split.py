"""Files in parts: what stands in them, that llama.cpp loads them, and that they appear together."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters import gguf_split
from cusprun.exporters.gguf import GgufExport, GgufReport, export_gguf
from cusprun.exporters.gguf_request import export_folder
from cusprun.exporters.proof import prove_gguf
from cusprun.runtimes import open_runtime
from cusprun.runtimes.gguf_header import load_metadata
from tests.exporters.models import make, windows
from tests.llama import open_llama

MOST = 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "pico")


@pytest.fixture
def split(folder: Path, tmp_path: Path) -> GgufReport:
    return GgufExport(folder, "f16").write(tmp_path / "out" / "x.gguf", split_max=MOST)


def logits(path: Path, ids: list[int]) -> np.ndarray:
    model = open_llama(path, n_ctx=64, logits_all=True)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def test_llama_cpp_loads_the_first_part_and_computes_the_same(split: GgufReport, folder: Path, tmp_path: Path) -> None:
    whole = export_gguf(folder, tmp_path / "whole.gguf", "f16")
    ids = windows(folder, 1, 32)[0].tolist()
    np.testing.assert_array_equal(logits(split.path, ids), logits(whole.path, ids))
    ours = [open_runtime(path, context=64, threads=1).logits(ids) for path in (split.path, whole.path)]
    np.testing.assert_array_equal(*ours)


def test_parts_have_the_names_and_keys_of_gguf_split(split: GgufReport, tmp_path: Path) -> None:
    count = len(split.parts)
    assert count > 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"x-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)
    ]
    names = []
    for index, path in enumerate(split.parts):
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if name.startswith("split.")}
        assert [field.contents() for field in fields.values()] == [index, count, len(split.types)]
        kinds = [field.types[0] for field in fields.values()]
        assert kinds == [gguf.GGUFValueType.UINT16, gguf.GGUFValueType.UINT16, gguf.GGUFValueType.INT32]
        assert ("tokenizer.ggml.tokens" in reader.fields) == (index == 0)
        assert path.stat().st_size <= MOST
        names += [tensor.name for tensor in reader.tensors]
    assert names == list(split.types)


def test_header_and_proof_take_the_whole(split: GgufReport, folder: Path, tmp_path: Path) -> None:
    whole = load_metadata(export_gguf(folder, tmp_path / "whole.gguf", "f16").path)
    info = load_metadata(split.path)
    assert (info.parameters, info.macs_per_token, info.types) == (whole.parameters, whole.macs_per_token, whole.types)
    assert info.file_bytes == split.bytes == sum(path.stat().st_size for path in split.parts)
    exact = GgufExport(folder, "f32").write(tmp_path / "exact.gguf", split_max=MOST)
    assert prove_gguf(exact.path, folder, windows(folder), threads=1).bytes == exact.bytes


def test_a_tensor_larger_than_a_part_gets_one_of_its_own(folder: Path, tmp_path: Path) -> None:
    report = GgufExport(folder, "q8_0").write(tmp_path / "x.gguf", split_max=1000)
    assert len(report.parts) == len(report.types) - sum(len(gguf.GGUFReader(path).tensors) - 1 for path in report.parts)
    assert load_metadata(report.path).parameters == report.parameters


def test_a_file_that_fits_is_not_split(folder: Path, tmp_path: Path) -> None:
    report = export_folder(folder, tmp_path / "x.gguf", "f16", split_max_size="1G")
    assert [path.name for path in report.parts] == ["x.gguf"]  # type: ignore[union-attr]


def test_parts_appear_together_or_not_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails when the third part gets its name."""
    calls = []

    def replace(source: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        os.rename(source, path)

    monkeypatch.setattr(gguf_split.os, "replace", replace)
    with pytest.raises(Failed, match="could not be written"):
        GgufExport(folder, "f16").write(tmp_path / "out" / "x.gguf", split_max=MOST)
    assert len(calls) == 3
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_that_are_there_are_not_overwritten(split: GgufReport, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"x-00001-of-.* exists"):
        export_folder(folder, tmp_path / "out" / "x.gguf", "f16", split_max_size="200K")


def test_a_part_that_is_missing_misnamed_or_not_the_first_is_named(split: GgufReport) -> None:
    with pytest.raises(InvalidRequest, match=r"is part 2 of a split file: name the first, .*-00001-of-"):
        load_metadata(split.parts[1])
    other = split.path.rename(split.path.with_name("other.gguf"))
    with pytest.raises(Failed, match="by its header and not by its name"):
        load_metadata(other)
    other.rename(split.path)
    split.parts[1].unlink()
    with pytest.raises(Failed, match=r"-00002-of-.* is missing"):
        load_metadata(split.path)


@pytest.mark.parametrize("size", ["", "0G", "-1M", "G", "two", "9" * 300 + "G"])
def test_sizes_that_are_none(tmp_path: Path, size: str) -> None:
    with pytest.raises(InvalidRequest, match=r"--split-max-size: .* such as 60MB"):
        export_folder(tmp_path, tmp_path / "x.gguf", "f16", split_max_size=size)
