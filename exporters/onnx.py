"""A model folder in, one ONNX folder out, which onnxruntime-genai opens and plain onnxruntime runs.

The graph is built operator by operator (:mod:`cusprun.exporters.onnx_graph`), every layer at its own widths; weights
are read, put into their type and written one matrix at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cusprun.anatomy import Anatomy, describe, read_config
from cusprun.checkpoint import Weights
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.onnx_folder import DATA, GRAPH, write_beside
from cusprun.exporters.onnx_graph import Decoder, build_model
from cusprun.exporters.onnx_matrices import Blocks, Dynamic, Float, Multiplies, Source
from cusprun.files import folder_written_whole, sha256_tree
from cusprun.onnx_types import BLOCK_SIZES, NAMES, OUTPUT_BITS, TYPES

LONGEST_CONTEXT = 32768  # positions that the rotary tables are written for, at most
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # scalings whose angles do not depend on the text's length
SMALL = 1024  # bytes up to which a constant stays in the graph


@dataclass(frozen=True)
class OnnxReport:
    """What was written."""

    path: Path
    quant: str
    bytes: int  # of the whole folder
    sha256: str  # of the folder's names and contents
    parameters: int
    context: int
    settings: dict[str, Any] = field(default_factory=dict)  # block size and the like, where the type has such


def export_onnx(
    model_dir: Path,
    out: Path,
    quant: str,
    *,
    name: str | None = None,
    context: int | None = None,
    block_size: int = 32,
    symmetric: bool = True,
    output_bits: int = 8,
) -> OnnxReport:
    """Writes the model folder ``model_dir`` to the folder ``out`` as ``quant``, one of cusprun.onnx_types.TYPES.

    ``context`` is the number of positions that can be used (default: the model's own, 32,768 at most). Of int4 only:
    ``block_size`` weights share a scale; without ``symmetric`` they share a fitted zero point too; ``output_bits`` is
    the width of the output layer. ``out`` appears whole or not at all. Raises InvalidRequest where the request or the
    folder makes no sense, Failed naming the tensor where weights are not finite or do not fit.
    """
    if quant not in TYPES:
        raise InvalidRequest(f"ONNX type {quant!r} is unknown: write one of {NAMES}")
    for label, value, known in (("block size", block_size, BLOCK_SIZES), ("output bits", output_bits, OUTPUT_BITS)):
        if value not in known:
            raise InvalidRequest(f"{label} {value} is not written: take one of {', '.join(map(str, known))}")
    anatomy, weights = describe(model_dir), Weights(model_dir)
    weights.check(anatomy)
    source = Source(weights, np.dtype(TYPES[quant].compute))
    multiplies: Multiplies
    settings: dict[str, Any] = {}
    if TYPES[quant].weight == "blocks":
        multiplies = Blocks(source, 4, block_size, k_quant=not symmetric, output_bits=output_bits)
        settings = {"block_size": block_size, "symmetric": symmetric, "output_bits": output_bits}
    else:
        multiplies = Dynamic(source) if TYPES[quant].weight == "dynamic" else Float(source)
    decoder = _decoder(model_dir, anatomy, context)
    model = build_model(decoder, source, multiplies)
    positions = len(decoder.cosines)
    try:
        with folder_written_whole(out) as part:
            ir.save(model, part / GRAPH, external_data=DATA, size_threshold_bytes=SMALL)
            write_beside(model_dir, part, anatomy, positions, name or model_dir.resolve().name, quant)
    except OSError as error:
        raise Failed(f"{out} could not be written: {error.strerror or error}") from error
    return OnnxReport(
        path=out,
        quant=quant,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        sha256=sha256_tree(out),
        parameters=anatomy.parameters,
        context=positions,
        settings=settings,
    )


def _decoder(folder: Path, anatomy: Anatomy, context: int | None) -> Decoder:
    config = read_config(folder)
    trained = int(config.get("max_position_embeddings") or 2048)
    if context is not None and not 1 <= context <= trained:
        raise InvalidRequest(f"a context of {context} tokens was asked for: the model was trained for {trained}")
    window = config.get("sliding_window")
    cosines, sines = rotary_tables(folder, context or min(trained, LONGEST_CONTEXT))
    return Decoder(
        anatomy, float(config.get("rms_norm_eps", 1e-6)), cosines, sines, int(window) if window is not None else None
    )


def rotary_tables(folder: Path, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding, each (positions, head_dim / 2) float32, as transformers makes them.

    Raises InvalidRequest for scalings whose angles change with the length of the text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise InvalidRequest(f"rope scaling {kind!r} is not exported to ONNX; {', '.join(STATIC_ROPE)} are")
    with torch.device("meta"):
        rotary = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    cosines, sines = rotary(config)(torch.zeros(1), torch.arange(positions).unsqueeze(0))
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].numpy(), sines[0, :, :half].numpy()
