"""Tensors written one by one are read by the safetensors package, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cusprun.checkpoint import write_weights
from cusprun.errors import Failed, InvalidRequest
from cusprun.tensor_file import ELEMENTS, TensorFile, write_tensors

TENSORS = {
    "odd.bf16": torch.randn(33).bfloat16(),  # what follows begins at no multiple of its own size
    "matrix": torch.randn(3, 5),
    "turned": torch.randn(7, 9).half().T,
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "naïve \"name\"": torch.arange(5),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(4, dtype=torch.uint8),
}  # fmt: skip


def written(path: Path) -> TensorFile:
    assert write_tensors(path, list(TENSORS), iter(TENSORS.items())) == sum(t.nbytes for t in TENSORS.values())
    return TensorFile(path)


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    written(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_written_or_what_the_package_wrote_is_read(tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "package.safetensors")
    for file in (written(tmp_path / "x.safetensors"), TensorFile(tmp_path / "package.safetensors")):
        assert set(file) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert file.shape(name) == tuple(tensor.shape)
            assert ELEMENTS[file.dtype(name)] == str(tensor.dtype).removeprefix("torch.")
            assert torch.equal(file[name], tensor)


def test_a_tensor_is_written_before_the_next_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    seen = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(4):
            yield f"t{index}", torch.full((300_000,), float(index))
            seen.append(path.stat().st_size)

    write_tensors(path, ["t0", "t1", "t2", "t3"], stream())
    assert [size // 1_200_000 for size in seen] == [1, 2, 3]


def test_an_unfinished_file_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected tensor c, was given b"):
        write_tensors(tmp_path / "x.safetensors", ["a", "c"], iter({"a": torch.zeros(4), "b": torch.zeros(4)}.items()))
    with pytest.raises(InvalidRequest, match="not a whole safetensors file"):
        TensorFile(tmp_path / "x.safetensors")


def test_weights_that_are_not_what_was_said(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(4)}
    with pytest.raises(ValueError, match="take 32 bytes, not 40"):
        write_weights(tmp_path, tensors.items(), {"a": 16, "b": 24})
    with pytest.raises(ValueError, match="b is one too many"):
        write_weights(tmp_path, tensors.items(), {"a": 16})
    with pytest.raises(ValueError, match="expected tensor c, was given None"):
        write_weights(tmp_path, tensors.items(), {"a": 16, "b": 16, "c": 16})


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as opened:
        opened.truncate(1200)
    with pytest.raises(Failed, match="ends before tensor"):
        list(map(file.__getitem__, file))
