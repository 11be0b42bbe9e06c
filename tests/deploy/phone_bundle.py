"""A tiny expert in both formats, and its phone bundle written to a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cusprun.deploy.expert import Expert, read_expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Notes, Wish
from cusprun.deploy.targets.phone import MOST, gather
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from tests import pico
from tests.deploy.bundles_made import write_files

NAME = "pico-legal"


def make_expert(folder: Path) -> Expert:
    """An expert's folder with q8_0 listed before q4_0, and ONNX int4; a vocabulary of 512, which divides by 8."""
    model = pico.save_model(folder / "model", vocab_size=512)
    artifacts = []
    for quant in ("q8_0", "q4_0"):
        written = export_gguf(model, folder / "gguf" / f"{NAME}-{quant}.gguf", quant)
        artifacts.append({"path": f"gguf/{NAME}-{quant}.gguf", "format": "gguf", "quant": quant, **told(written)})
    artifacts.append({"path": "onnx/int4", "format": "onnx", "quant": "int4"})
    artifacts[-1] |= told(export_onnx(model, folder / "onnx" / "int4", "int4"))
    sizes = {"base": {"id": "pico-llama", "parameters": 2}, "expert": {"parameters": 1}}
    card = {"schema_version": 1, "name": NAME, **sizes, "artifacts": artifacts}
    (folder / "expert.json").write_text(json.dumps(card))
    return read_expert(folder)


def told(report: object) -> dict[str, object]:
    return {key: getattr(report, key) for key in ("bytes", "sha256")}


def write_bundle(expert: Expert, out: Path, *, name: str = NAME, wish: Wish | None = None, most: int = MOST) -> Notes:
    """Gathers the bundle of an expert of that name and writes its files."""
    files = Files()
    notes = gather(replace(expert, name=name), files, wish or Wish(), most)
    write_files(files, out)
    return notes
