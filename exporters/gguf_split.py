"""One .gguf into several of at most so many bytes, under the names and with the keys of llama.cpp's gguf-split.

llama.cpp opens the first part and finds the others. All metadata is in the first.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from gguf import GGMLQuantizationType, GGUFValueType

from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf_source import padded
from cusprun.files import aside, copy_range
from cusprun.runtimes.gguf_header import TensorInfo, part_path, read_layout

MOST_PARTS = 65535  # split.count has 16 bits


def existing_parts(out: Path) -> list[Path]:
    """Parts of a split file that lie where those of ``out`` would."""
    found = out.parent.glob("*.gguf") if out.parent.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(re.escape(out.stem) + r"-\d{5}-of-\d{5}", path.stem))


def split_gguf(whole: Path, out: Path, most: int) -> list[Path]:
    """Copies ``whole`` into parts of at most ``most`` bytes beside ``out``; all of them appear, or none.

    A tensor is never split: where one alone is larger, so is its part. The first part appears last, and no part is
    read without it. Raises InvalidRequest where there would be too many parts.
    """
    pairs, kept, tensors, start = read_layout(whole)
    groups = _group(tensors, len(kept), most)
    if len(groups) > MOST_PARTS:
        raise InvalidRequest(
            f"--split-max-size: {len(groups)} parts are more than the format counts; write a larger size"
        )
    paths = [part_path(out, index, len(groups)) for index in range(len(groups))]
    with ExitStack() as stack, whole.open("rb") as source:
        parts = []
        for index, group in enumerate(groups):
            part = aside(paths[index])
            stack.callback(part.unlink, missing_ok=True)
            with part.open("wb") as file:
                keys = _split_keys(index, len(groups), len(tensors))
                count = len(SPLIT_KEYS) + (0 if index else pairs)
                file.write(b"GGUF" + struct.pack("<IQQ", 3, len(group), count))
                if not index:
                    copy_range(source, kept.start, len(kept), file)
                file.write(keys + _infos(group))
                for tensor in group:
                    _pad(file)
                    copy_range(source, start + tensor.offset, tensor.bytes, file)
                _pad(file)
            parts.append(part)
        placed = stack.enter_context(ExitStack())  # takes back what was placed when a later one fails
        for part, path in reversed(list(zip(parts, paths, strict=True))):
            os.replace(part, path)
            placed.callback(path.unlink, missing_ok=True)
        placed.pop_all()
    return paths


SPLIT_KEYS = (
    ("split.no", GGUFValueType.UINT16, "<H"),
    ("split.count", GGUFValueType.UINT16, "<H"),
    ("split.tensors.count", GGUFValueType.INT32, "<i"),
)


def _split_keys(*values: int) -> bytes:
    return b"".join(
        _string(name) + struct.pack("<I", kind) + struct.pack(form, value)
        for (name, kind, form), value in zip(SPLIT_KEYS, values, strict=True)
    )


def _group(tensors: Sequence[TensorInfo], metadata: int, most: int) -> list[list[TensorInfo]]:
    """The tensors in their order, in groups whose files have at most ``most`` bytes; at least one in each."""
    keys = 24 + len(_split_keys(0, 0, 0))
    groups: list[list[TensorInfo]] = [[]]
    header, data = keys + metadata, 0
    for tensor in tensors:
        info, size = len(_infos([tensor])), padded(tensor.bytes)
        if groups[-1] and padded(header + info) + data + size > most:
            groups.append([])
            header, data = keys, 0
        groups[-1].append(tensor)
        header, data = header + info, data + size
    return groups


def _infos(tensors: Sequence[TensorInfo]) -> bytes:
    found, offset = b"", 0
    for tensor in tensors:
        shape = tuple(reversed(tensor.shape))
        found += _string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        found += struct.pack("<IQ", GGMLQuantizationType[tensor.type], offset)
        offset += padded(tensor.bytes)
    return found


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(file: BinaryIO) -> None:
    file.write(bytes(padded(file.tell()) - file.tell()))
