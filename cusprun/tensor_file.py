"""One safetensors file: its header, a tensor read at its offset, tensors written one after another.

The package's own reader maps the file, and every page it touches counts as this process's memory for as long as the
file is open; its writer wants all tensors at once. Here a tensor is read into memory of its own and written from it, so
that no more than one is held. What is written is what the format's specification says: the header's length, the header
padded with spaces, the data without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cusprun.errors import Failed, InvalidRequest

if TYPE_CHECKING:
    import torch

# Names of the element types in a header and in torch.
ELEMENTS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NOISE = 1_048_583  # numbers until they repeat, a prime
ENTRY_ROOM = 192  # bytes of a header's entry beside the name: element type, shape and offsets of up to 20 digits each


class TensorFile:
    """The tensors of one safetensors file; each is read when it is asked for and never kept."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises InvalidRequest where the file is damaged or cut short."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np"):  # checks lengths, offsets and that nothing is left over
                pass
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header: dict[str, Any] = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise InvalidRequest(f"{path} is not a whole safetensors file: {error}") from error
        self.path = path
        self._data = 8 + length
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """The safetensors name of the element type: F32, F16, BF16 ..."""
        return str(self._entries[name]["dtype"])

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, in its stored element type. Raises Failed where torch has no such type or the file has shrunk."""
        import torch

        entry = self._entries[name]
        if entry["dtype"] not in ELEMENTS:
            raise Failed(f"{self.path}: tensor {name} has element type {entry['dtype']}, which is not read")
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        left = data.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data + begin)
            while left:  # the system hands over 2 GiB at a time at most
                count = file.readinto(left)
                if not count:
                    raise Failed(f"{self.path} ends before tensor {name} does: it has changed since it was opened")
                left = left[count:]
        return data.view(getattr(torch, ELEMENTS[entry["dtype"]])).reshape(entry["shape"])


def write_tensors(path: Path, names: Sequence[str], tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Takes as many tensors as there are ``names``, in their order, and writes each before it takes the next.

    The header goes in last, into room kept for it: until then the file is none. Returns the bytes of the tensors.
    Raises ValueError where another tensor comes than the one whose turn it is.
    """
    import torch

    elements = {getattr(torch, of_torch): element for element, of_torch in ELEMENTS.items()}
    room = _header_room(names)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name in names:
            given, tensor = next(tensors, (None, None))
            if given != name or tensor is None:
                raise ValueError(f"expected tensor {name}, was given {given}")
            held = tensor.detach().cpu().contiguous()
            file.write(held.reshape(-1).view(torch.uint8).numpy().data)
            end = begin + math.prod(held.shape) * held.element_size()
            header[name] = {"dtype": elements[held.dtype], "shape": list(held.shape), "data_offsets": [begin, end]}
            begin = end
            del tensor, held
        _write_header(file, header, room)
    return begin


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]], element: str) -> None:
    """A file of tensors that are all zero, of element type ``element``; its data are a hole that takes no disk."""
    import torch

    size = torch.empty(0, dtype=getattr(torch, ELEMENTS[element])).element_size()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    room, begin = _header_room(list(shapes)), 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * size
        header[name] = {"dtype": element, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    with path.open("wb") as file:
        _write_header(file, header, room)
        file.truncate(8 + room + begin)


def write_noise(path: Path, shapes: Mapping[str, tuple[int, ...]], element: str) -> None:
    """A file of tensors of small normal numbers, always the same; no two pages of it are alike."""
    import torch

    noise = (0.02 * torch.randn(NOISE, generator=torch.Generator().manual_seed(0))).to(
        getattr(torch, ELEMENTS[element])
    )
    begin = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal begin
        for name, shape in shapes.items():
            size = math.prod(shape)
            yield name, noise.repeat(-(-(begin + size) // NOISE))[begin : begin + size].reshape(shape)
            begin = (begin + size) % NOISE

    write_tensors(path, list(shapes), tensors())


def _header_room(names: Sequence[str]) -> int:
    room = sum(len(json.dumps(name)) + ENTRY_ROOM for name in names) + ENTRY_ROOM
    return room + -(8 + room) % 64  # the data begins on a whole block


def _write_header(file: BinaryIO, header: Mapping[str, Any], room: int) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > room:
        raise ValueError(f"{file.name}: the header takes {len(text)} bytes and {room} were kept for it")
    file.seek(0)
    file.write(struct.pack("<Q", room) + text.ljust(room))
