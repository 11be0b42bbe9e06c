"""The weights of an ONNX folder into several files of at most so many bytes; the graph names where each tensor lies.

onnxruntime and onnxruntime-genai open the folder as before: external data may lie in any number of files.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from cusprun.errors import Failed
from cusprun.exporters.onnx_folder import DATA, GRAPH
from cusprun.files import copy_range

PAGE = 4096  # where large tensors begin, so that they can be mapped into memory
LARGE = 2**16
SMALL_STEP = 64


def split_onnx(folder: Path, out: Path, most: int) -> list[Path]:
    """Writes the graph of ``folder`` and its weights in files of at most ``most`` bytes into the folder ``out``.

    Returns what was written, the graph first. A tensor is never split: where one alone is larger, so is its file.
    Nothing else of the folder is copied. Raises Failed where the graph names weights that are not there.
    """
    model = onnx.load(folder / GRAPH, load_external_data=False)
    tensors = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors}
    tensors.sort(key=lambda t: int(places[t.name].get("offset", 0)))
    groups = _group([int(places[t.name]["length"]) for t in tensors], most)
    out.mkdir(parents=True, exist_ok=True)
    paths, first = [out / GRAPH], 0
    with (folder / DATA).open("rb") as source:
        for index, count in enumerate(groups):
            paths.append(out / f"model-{index + 1:05d}-of-{len(groups):05d}.onnx.data")
            with paths[-1].open("wb") as file:
                for tensor in tensors[first : first + count]:
                    place = places[tensor.name]
                    if place["location"] != DATA:
                        raise Failed(f"{folder / GRAPH} has weights in {place['location']}: export it again")
                    length = int(place["length"])
                    file.write(bytes(-file.tell() % _step(length)))
                    moved = {"location": paths[-1].name, "offset": str(file.tell()), "length": str(length)}
                    copy_range(source, int(place.get("offset", 0)), length, file)
                    del tensor.external_data[:]
                    for key, value in moved.items():
                        tensor.external_data.add(key=key, value=value)
            first += count
    paths[0].write_bytes(model.SerializeToString(deterministic=True))
    return paths


def _step(length: int) -> int:
    return PAGE if length >= LARGE else SMALL_STEP


def _group(lengths: list[int], most: int) -> list[int]:
    """How many tensors go into each file, in their order; at least one."""
    groups, at = [0], 0
    for length in lengths:
        start = at + -at % _step(length)
        if groups[-1] and start + length > most:
            groups.append(0)
            start = 0
        groups[-1] += 1
        at = start + length
    return groups
