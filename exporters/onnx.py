"""A model folder in, one ONNX folder out, which onnxruntime-genai opens and plain onnxruntime runs.

The graph is built operator by operator (:mod:`cusprun.exporters.onnx_graph`), every layer at its own widths; weights
are read, put into their type and written one matrix at a time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cusprun.anatomy import Anatomy, describe, read_config
from cusprun.checkpoint import Weights
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.compensation import Compensated
from cusprun.exporters.grids import Grid, find_grid
from cusprun.exporters.onnx_folder import DATA, GRAPH, tokenizer_files, write_beside
from cusprun.exporters.onnx_graph import Decoder, Tables, build_model
from cusprun.exporters.onnx_matrices import Blocks, Dynamic, Float, Multiplies, Source
from cusprun.files import folder_written_whole, sha256_tree
from cusprun.onnx_types import BLOCK_SIZES, NAMES, OUTPUT_BITS, TYPES

LONGEST_CONTEXT = 32768  # positions that the rotary tables are written for, at most
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # scalings whose angles do not depend on the text's length
SMALL = 1024  # bytes up to which a constant stays in the graph


@dataclass(frozen=True)
class OnnxPrediction:
    """What a folder will be: ``bytes`` are those of weights and tokenizer; the graph comes on top."""

    quant: str
    bytes: int
    parameters: int
    context: int
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge export --dry-run --json` prints."""
        return {**asdict(self), "format": "onnx"}

    def as_lines(self) -> list[str]:
        """What `cusprun-edge export --dry-run` prints."""
        told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items())
        size = f"{self.bytes} bytes ({self.bytes / 2**20:.1f} MiB) of weights and tokenizer"
        return [f"{self.quant}  {size}  ONNX, context {self.context}" + (f", {told}" if told else "")]


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

    def as_json(self) -> dict[str, Any]:
        """What `cusprun-edge export --json` prints."""
        return {**asdict(self), "path": str(self.path), "format": "onnx"}

    def as_lines(self) -> list[str]:
        """What `cusprun-edge export` prints."""
        return [f"{self.path}  {self.bytes / 2**20:.1f} MiB  onnx"]


def export_onnx(model_dir: Path, out: Path, quant: str, **settings: Any) -> OnnxReport:
    """Writes the model folder ``model_dir`` to the folder ``out``; the rest is :class:`OnnxExport`'s."""
    return OnnxExport(model_dir, quant, **settings).write(out)


class OnnxExport:
    """A request for one folder that was checked in all that needs no work.

    ``quant`` is one of cusprun.onnx_types.TYPES, ``context`` the number of positions that can be used (default: the
    model's own, 32,768 at most). Of int4 only: ``block_size`` weights share a scale; without ``symmetric`` they share a
    fitted zero point too; ``output_bits`` is the width of the output layer. Raises InvalidRequest where the request or
    the folder makes no sense.
    """

    def __init__(
        self,
        model_dir: Path,
        quant: str,
        *,
        name: str | None = None,
        context: int | None = None,
        block_size: int = 32,
        symmetric: bool = True,
        output_bits: int = 8,
    ) -> None:
        if quant not in TYPES:
            raise InvalidRequest(f"ONNX type {quant!r} is unknown: write one of {NAMES}")
        for label, value, known in (("block size", block_size, BLOCK_SIZES), ("output bits", output_bits, OUTPUT_BITS)):
            if value not in known:
                raise InvalidRequest(f"{label} {value} is not written: take one of {', '.join(map(str, known))}")
        self.model_dir, self.quant, self.name = model_dir, quant, name or model_dir.resolve().name
        self.anatomy, weights = describe(model_dir), Weights(model_dir)
        weights.check(self.anatomy)
        source = Source(weights, np.dtype(TYPES[quant].compute))
        multiplies: Multiplies
        self.settings: dict[str, Any] = {}
        if TYPES[quant].weight == "blocks":
            multiplies = Blocks(source, 4, block_size, k_quant=not symmetric, output_bits=output_bits)
            self.settings = {"block_size": block_size, "symmetric": symmetric, "output_bits": output_bits}
        else:
            multiplies = Dynamic(source) if TYPES[quant].weight == "dynamic" else Float(source)
        decoder = _decoder(model_dir, self.anatomy, context)
        self.positions = decoder.positions
        self._multiplies = multiplies
        self._model = build_model(decoder, source, multiplies)

    @property
    def prediction(self) -> OnnxPrediction:
        """What the folder will be."""
        tensors = [value.const_value for value in self._model.graph.initializers.values()]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        size += sum(file.stat().st_size for file in tokenizer_files(self.model_dir))
        return OnnxPrediction(self.quant, size, self.anatomy.parameters, self.positions, self.settings)

    @property
    def grids(self) -> dict[str, Grid]:
        """The folder's matrices that can be rounded with compensation: those of the layers whose rows divide."""
        block, family = self.settings["block_size"], self.anatomy.family
        return {
            name: find_grid("int4", block)
            for name, shape in self.anatomy.tensor_shapes()
            if name not in (family.embedding, family.output) and len(shape) == 2 and shape[1] % block == 0
        }

    def write(self, out: Path, compensated: Compensated | None = None) -> OnnxReport:
        """Writes the folder, whole or not at all; matrices of ``compensated`` are taken as they are.

        They are on the grids of :attr:`grids`. Raises Failed naming a tensor that is not finite or does not fit.
        """
        if isinstance(self._multiplies, Blocks):
            self._multiplies.compensated = compensated
        try:
            with folder_written_whole(out) as part:
                ir.save(self._model, part / GRAPH, external_data=DATA, size_threshold_bytes=SMALL)
                write_beside(self.model_dir, part, self.anatomy, self.positions, self.name, self.quant)
        except OSError as error:
            raise Failed(f"{out} could not be written: {error.strerror or error}") from error
        return OnnxReport(
            path=out,
            quant=self.quant,
            bytes=sum(file.stat().st_size for file in out.iterdir()),
            sha256=sha256_tree(out),
            parameters=self.anatomy.parameters,
            context=self.positions,
            settings=self.settings,
        )


def _decoder(folder: Path, anatomy: Anatomy, context: int | None) -> Decoder:
    trained = int(read_config(folder).get("max_position_embeddings") or 2048)
    if context is not None and not 1 <= context <= trained:
        raise InvalidRequest(f"a context of {context} tokens was asked for: the model was trained for {trained}")
    positions = context or min(trained, LONGEST_CONTEXT)
    bases = {layer.theta for layer in anatomy.attention}
    return Decoder(anatomy, {base: rotary_tables(folder, positions, anatomy.head_dim, base) for base in bases})


def rotary_tables(folder: Path, positions: int, head_dim: int, theta: float | None = None) -> Tables:
    """Cosines and sines of the rotary embedding, each (positions, head_dim / 2) float32.

    They are transformers' own, of the layers that see everything; with ``theta`` the plain ones to that base. Raises
    InvalidRequest for scalings whose angles change with the length of the text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    steps = torch.arange(positions)
    if theta is not None:
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = steps[:, None].float() * frequencies
        return angles.cos().numpy(), angles.sin().numpy()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    settings = getattr(config, "rope_parameters", None) or {}
    kinds = {"layer_type": "full_attention"} if "full_attention" in settings else {}
    kind = settings.get("full_attention", settings).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise InvalidRequest(f"rope scaling {kind!r} is not exported to ONNX; {', '.join(STATIC_ROPE)} are")
    with torch.device("meta"):
        rotary = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    cosines, sines = rotary(config)(torch.zeros(1), steps.unsqueeze(0), **kinds)
    half = head_dim // 2
    return cosines[0, :, :half].numpy(), sines[0, :, :half].numpy()
