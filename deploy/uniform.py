"""`ship --layout uniform`: an expert's per-layer GGUF written anew with one width for all layers, for what opens no
other. The function is the same; the file is as large as if every layer were as wide as the widest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cusprun.anatomy import describe
from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.targets import Wish
from cusprun.errors import InvalidRequest
from cusprun.exporters.request import Settings, export_model
from cusprun.exporters.uniform import fill_up
from cusprun.files import sha256_file
from cusprun.progress import say


def with_uniform(expert: Expert, wish: Wish, scratch: Path) -> Expert:
    """The expert with one GGUF, of uniform layout, in the type of the wish; proved as every export is.

    Raises InvalidRequest where ONNX is wished for, or what the exporters refuse.
    """
    if wish.format == "onnx":
        raise InvalidRequest("--layout uniform is for GGUF: onnxruntime runs layers of any width")
    before = expert.of("gguf", wish.quant)
    if describe(expert.model).uniform:
        return expert
    fill_up(expert.model, scratch / "model")
    path = scratch / f"{expert.name}-uniform-{before.quant}.gguf"
    settings = Settings(name=expert.name, rounding="nearest")
    export_model(scratch / "model", path, ("gguf",), (before.quant,), settings)
    after = Artifact(path, "gguf", before.quant, path.stat().st_size, sha256_file(path))
    say(
        f"one width for all layers: {after.bytes / 2**20:.1f} MiB instead of {before.bytes / 2**20:.1f}; "
        f"smaller: cusprun-edge build --recipe {expert.folder / 'recipe.yaml'} --layout uniform --out ANOTHER"
    )
    return replace(expert, artifacts=(after, *(one for one in expert.artifacts if one.format != "gguf")))
