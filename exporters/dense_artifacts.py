"""The dense model in any type, rounded as its experts are: what they are held against. Kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cusprun.corpora.cache import cache_folder
from cusprun.corpora.selection import read_windows
from cusprun.dense import Dense
from cusprun.exporters.compensation import Roundings
from cusprun.files import sha256_file
from cusprun.formats import Rounding, format_of, rounding_of
from cusprun.preflight import model_name
from cusprun.quants import TYPES, is_weighed, parse_override
from cusprun.recipe import ROUNDING_STRIDE, Recipe
from cusprun.stages import VERSIONS

if TYPE_CHECKING:
    from cusprun.exporters.gguf import GgufExport


def sample_windows(path: Path) -> dict[str, np.ndarray]:
    """Some of the calibration windows of a file, (n, window) by text: rounding needs fewer than the cut."""
    return {name: ids[::ROUNDING_STRIDE] for name, ids in read_windows(path).items()}


def take_imatrix(folder: Path, windows: Path, path: Path, device: str) -> None:
    """Writes the importance matrix of a model folder on some of the calibration windows, in llama.cpp's own form."""
    from cusprun.exporters.imatrix import collect_imatrix
    from cusprun.exporters.imatrix_file import write_imatrix

    texts = sample_windows(windows)
    write_imatrix(path, collect_imatrix(folder, texts, device), list(texts))


def onnx_settings(recipe: Recipe) -> dict[str, Any]:
    """What OnnxExport is told of a recipe."""
    return {
        "block_size": recipe.block_size,
        "symmetric": not recipe.zero_points,
        "output_bits": recipe.output_bits,
    }


class DenseArtifacts:
    """Artifacts of one dense model on one calibration text.

    ``windows`` is the file of calibration windows, ``aside`` a folder for what compensated rounding puts away, ``wish``
    how is rounded, ``overrides`` pairs of a regular expression and a type, ``onnx`` settings of OnnxExport.
    """

    def __init__(
        self,
        dense: Dense,
        windows: Path,
        aside: Path,
        *,
        wish: Rounding = "auto",
        overrides: Sequence[tuple[str, str]] = (),
        onnx: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.dense, self.windows, self.wish, self.device = dense, windows, wish, device
        self.overrides, self.onnx = list(overrides), dict(onnx or {})
        self._rounded = Roundings(dense.folder, lambda: sample_windows(windows), aside, device)

    @classmethod
    def of(cls, recipe: Recipe, dense: Dense, windows: Path, aside: Path) -> DenseArtifacts:
        """Written as the experts of a recipe are."""
        overrides = [parse_override(value) for value in recipe.tensor_type]
        return cls(
            dense, windows, aside, wish=recipe.rounding, overrides=overrides, onnx=onnx_settings(recipe),
            device=recipe.device,
        )  # fmt: skip

    def artifact(self, quant: str) -> Path:
        """The .gguf file or ONNX folder in one type; written where the cache has none."""
        symmetric = self.onnx.get("symmetric", True)
        rounding = rounding_of(quant, self.wish, zero_points=not symmetric)
        return (self._gguf if format_of(quant) == "gguf" else self._onnx)(quant, rounding)

    def gguf_bytes(self, quant: str) -> int:
        """Bytes of the .gguf file in one type, told before there is one; the text it is rounded on need not exist."""
        return self._export(quant, rounding_of(quant, self.wish, zero_points=False)).prediction.bytes

    def _export(self, quant: str, rounding: Rounding) -> GgufExport:
        from cusprun.exporters.gguf import GgufExport

        overrides = [] if TYPES[quant].plain else self.overrides
        weighed = rounding != "nearest" and is_weighed(quant)
        return GgufExport(
            self.dense.folder, quant, name=model_name(self.dense.id), overrides=overrides, weighed=weighed
        )  # fmt: skip

    def _gguf(self, quant: str, rounding: Rounding) -> Path:
        label = model_name(self.dense.id)
        made_by = f"{VERSIONS['gguf']}-{version('llama-cpp-python')}"  # whose quantizer chooses the mix of types
        folder = cache_folder() / "dense-gguf" / f"{self.dense.key[:16]}-{made_by}"
        overrides = [] if TYPES[quant].plain else self.overrides
        name = label + self._rounded_by(rounding)
        weighed = rounding != "nearest" and is_weighed(quant)
        matrix = folder / f"{label}{self._rounded_by('imatrix')}.imatrix" if weighed else None
        if overrides:
            name += "-" + hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]
        path = folder / f"{name}-{quant}.gguf"
        if not path.is_file():
            if matrix is not None and not matrix.is_file():
                take_imatrix(self.dense.folder, self.windows, matrix, self.device)
            export = self._export(quant, rounding)
            export.write(path, matrix, compensated=self._rounded.for_export(rounding, export))
        return path

    def _onnx(self, quant: str, rounding: Rounding) -> Path:
        from cusprun.exporters.onnx import OnnxExport

        digest = hashlib.sha256(json.dumps(self.onnx, sort_keys=True).encode()).hexdigest()[:8]
        made_by = f"{VERSIONS['onnx']}-{version('onnxruntime')}"
        name = f"{self.dense.key[:16]}-{made_by}-{quant}" + (f"-{digest}" if quant == "int4" else "")
        name += self._rounded_by(rounding)
        path = cache_folder() / "dense-onnx" / name
        if not path.is_dir():
            export = OnnxExport(self.dense.folder, quant, name=model_name(self.dense.id), **self.onnx)
            export.write(path, self._rounded.for_export(rounding, export))
        return path

    def _rounded_by(self, rounding: Rounding) -> str:
        """What the name of an artifact says of its rounding: two texts make two files."""
        if rounding == "nearest":
            return ""
        text = sha256_file(self.windows)[:16]
        return f"-{text}" if rounding == "imatrix" else f"-gptq{VERSIONS['gptq']}-{text}"
