"""What a build exports: the expert in every type that was asked for, each proved, and the dense model beside it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cusprun import __version__
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.selection import read_texts, read_windows
from cusprun.cut import Cut
from cusprun.dense import Dense, local_path
from cusprun.exporters.compensation import Roundings
from cusprun.files import folder_written_whole, sha256_file, written_whole
from cusprun.formats import Rounding, format_of, rounding_of
from cusprun.preflight import Prepared, model_name
from cusprun.quants import TYPES, is_weighed, parse_override
from cusprun.recipe import ROUNDING_STRIDE
from cusprun.stages import VERSIONS, Stages

PROOF_WINDOWS = 8


def sample_windows(path: Path) -> dict[str, np.ndarray]:
    """Some of the calibration windows of a file, (n, window) by text: rounding needs fewer than the cut."""
    return {name: ids[::ROUNDING_STRIDE] for name, ids in read_windows(path).items()}


class Artifacts:
    """Exports of one build; each is a stage."""

    def __init__(self, prepared: Prepared, dense: Dense, stages: Stages, cut: Cut) -> None:
        self.prepared, self.recipe, self.out = prepared, prepared.recipe, prepared.out
        self.dense, self.stages, self.cut = dense, stages, cut
        aside, device = stages.folder, self.recipe.device
        self._expert_rounded = Roundings(self.out / "model", lambda: sample_windows(self._own_windows()), aside, device)
        self._dense_rounded = Roundings(dense.folder, lambda: sample_windows(cut.windows_path), aside, device)

    def export(self, quant: str, model_key: str) -> dict[str, Any]:
        """Writes and proves the expert in one type; its entry in expert.json."""
        return (self._gguf if format_of(quant) == "gguf" else self._onnx)(quant, model_key)

    def dense_artifact(self, quant: str) -> Path:
        """The dense model in the same type, rounded in the same way; written once for all builds on the same text."""
        return (self._dense_gguf if format_of(quant) == "gguf" else self._dense_onnx)(quant)

    def _rounding(self, quant: str) -> Rounding:
        return rounding_of(quant, self.recipe.rounding, zero_points=self.recipe.zero_points)

    # GGUF ------------------------------------------------------------------------------------------------------------

    def _gguf(self, quant: str, model_key: str) -> dict[str, Any]:
        path = self.out / "gguf" / f"{self.prepared.name}-{quant}.gguf"
        rounding = self._rounding(quant)
        matrix = self._imatrix(model_key) if rounding != "nearest" and is_weighed(quant) else None
        overrides = self._overrides(quant)

        def write() -> dict[str, Any]:
            from cusprun.exporters.gguf import GgufExport
            from cusprun.exporters.proof import prove_gguf

            windows = self._proof_windows()
            with written_whole(path) as part:  # under its own name only once llama.cpp has answered as torch does
                candidate = part.with_name(f"{part.name}.gguf")  # a name that a later build sweeps away
                try:
                    export = GgufExport(
                        self.out / "model", quant, name=self.prepared.name, metadata=self._metadata(),
                        overrides=overrides, weighed=matrix is not None,
                    )  # fmt: skip
                    compensated = self._expert_rounded.for_export(rounding, export)
                    report = export.write(candidate, matrix, compensated=compensated)
                    proof = prove_gguf(candidate, self.out / "model", windows, threads=self.recipe.threads)
                    os.replace(candidate, part)
                finally:
                    candidate.unlink(missing_ok=True)
            return {
                "path": path.relative_to(self.out).as_posix(),
                "format": "gguf",
                "quant": quant,
                "arch": report.arch,
                "bytes": report.bytes,
                "sha256": report.sha256,
                "rounding": "gptq" if compensated else "imatrix" if matrix else "nearest",
                "fallbacks": [asdict(fallback) for fallback in report.fallbacks],
                "proof": proof.as_dict(),
            }

        names = json.dumps([self.prepared.name, self._metadata()], sort_keys=True)
        keys = [model_key, names, *self.recipe.tensor_type, *([sha256_file(matrix)] if matrix else [])]
        keys += self._rounding_keys(rounding)
        exported = self.stages.step(f"gguf.{quant}", keys, [path], write)
        value: dict[str, Any] = exported["value"]
        return value

    def _overrides(self, quant: str) -> list[tuple[str, str]]:
        """Types of single tensors; files that no quantizer writes have none."""
        return [] if TYPES[quant].plain else [parse_override(value) for value in self.recipe.tensor_type]

    def _imatrix(self, model_key: str) -> Path:
        """The expert's importance matrix on some of the calibration windows, in llama.cpp's own form."""
        path = self.out / "gguf" / f"{self.prepared.name}.imatrix"
        base = self.cut.base
        assert base is not None
        self.stages.step(
            "imatrix", [model_key, base.key], [path], lambda: self._take_imatrix(self.out / "model", base.windows, path)
        )
        return path

    def _own_windows(self) -> Path:
        """The calibration windows in the expert's own tokens."""
        assert self.cut.base is not None
        return self.cut.base.windows

    def _rounding_keys(self, rounding: Rounding) -> list[str]:
        """What compensated rounding depends on beside the model."""
        if rounding != "gptq":
            return []
        assert self.cut.base is not None
        return [rounding, self.cut.base.key, str(VERSIONS["gptq"])]

    def _take_imatrix(self, folder: Path, windows: Path, path: Path) -> None:
        from cusprun.exporters.imatrix import collect_imatrix
        from cusprun.exporters.imatrix_file import write_imatrix

        texts = sample_windows(windows)
        write_imatrix(path, collect_imatrix(folder, texts, self.recipe.device), list(texts))

    def _metadata(self) -> dict[str, str | list[str]]:
        from cusprun.exporters.gguf_card import read_card

        scenario, dense = self.prepared.scenario, self.dense
        of_hub = local_path(self.recipe.model) is None
        card, corpora = read_card(dense.folder), self.cut.text.get("corpora", [])
        values: dict[str, str | list[str] | None] = {
            **{key: card[key] for key in ("license_name", "license_link") if key in card},
            "license": dense.licence,
            "base_model": [dense.id if of_hub else Path(dense.id).name],
            "languages": [scenario.language] if scenario.language else [],
            "tags": ["cusprun", *scenario.given().values()],
            "datasets": sorted({row["entry"] for row in corpora if row["side"] == "calibration" and row["source"]}),
            "cusprun.method": self.recipe.method,
            "cusprun.version": __version__,
        }
        return {key: value for key, value in values.items() if value}

    def _dense_gguf(self, quant: str) -> Path:
        from cusprun.exporters.gguf import GgufExport

        name = model_name(self.dense.id)
        folder = cache_folder() / "dense-gguf" / f"{self.dense.key[:16]}-{VERSIONS['gguf']}"
        matrix, overrides = None, self._overrides(quant)
        rounding = self._rounding(quant)
        name += self._rounded_by(rounding)
        if rounding != "nearest" and is_weighed(quant):
            matrix = folder / f"{name}.imatrix"
            if not matrix.is_file():
                self._take_imatrix(self.dense.folder, self.cut.windows_path, matrix)
        if overrides:
            name += "-" + hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]
        path = folder / f"{name}-{quant}.gguf"
        if not path.is_file():
            weighed, label = matrix is not None, model_name(self.dense.id)
            export = GgufExport(self.dense.folder, quant, name=label, overrides=overrides, weighed=weighed)
            export.write(path, matrix, compensated=self._dense_rounded.for_export(rounding, export))
        return path

    def _rounded_by(self, rounding: Rounding) -> str:
        """What the name of a dense artifact says of its rounding: two texts make two files."""
        if rounding == "nearest":
            return ""
        text = sha256_file(self.cut.windows_path)[:16]
        return f"-{text}" if rounding == "imatrix" else f"-gptq{VERSIONS['gptq']}-{text}"

    # ONNX ------------------------------------------------------------------------------------------------------------

    def _onnx(self, quant: str, model_key: str) -> dict[str, Any]:
        path = self.out / "onnx" / quant
        settings, rounding = self._onnx_settings(), self._rounding(quant)

        def write() -> dict[str, Any]:
            from cusprun.exporters.onnx import OnnxExport
            from cusprun.exporters.proof import prove_onnx

            with folder_written_whole(path) as part:
                export = OnnxExport(self.out / "model", quant, name=self.prepared.name, **settings)
                report = export.write(part, self._expert_rounded.for_export(rounding, export))
                proof = prove_onnx(part, self.out / "model", quant, self._proof_windows(), threads=self.recipe.threads)
            return {
                "path": path.relative_to(self.out).as_posix(),
                "format": "onnx",
                "quant": quant,
                "bytes": report.bytes,
                "sha256": report.sha256,
                "rounding": rounding,
                **report.settings,
                "proof": proof.as_dict(),
            }

        keys = [model_key, self.prepared.name, json.dumps(settings, sort_keys=True), *self._rounding_keys(rounding)]
        exported = self.stages.step(f"onnx.{quant}", keys, [path], write)
        value: dict[str, Any] = exported["value"]
        return value

    def _onnx_settings(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "block_size": recipe.block_size,
            "symmetric": not recipe.zero_points,
            "output_bits": recipe.output_bits,
        }

    def _dense_onnx(self, quant: str) -> Path:
        from cusprun.exporters.onnx import OnnxExport

        settings, rounding = self._onnx_settings(), self._rounding(quant)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{self.dense.key[:16]}-{VERSIONS['onnx']}-{quant}" + (f"-{digest}" if quant == "int4" else "")
        name += self._rounded_by(rounding)
        path = cache_folder() / "dense-onnx" / name
        if not path.is_dir():
            export = OnnxExport(self.dense.folder, quant, name=model_name(self.dense.id), **settings)
            export.write(path, self._dense_rounded.for_export(rounding, export))
        return path

    def _proof_windows(self) -> np.ndarray:
        """Held-out text in windows, for the comparison with torch."""
        texts, _ = read_texts(self.cut.texts_path)
        tokenizer = load_tokenizer(self.out / "model")
        ids: list[int] = []
        for document in next(iter(texts.values()), []):
            ids += tokenizer(document, add_special_tokens=False)["input_ids"]
            if len(ids) >= PROOF_WINDOWS * self.recipe.window:
                break
        count = min(PROOF_WINDOWS, len(ids) // self.recipe.window)
        if count:
            return np.array(ids[: count * self.recipe.window], dtype=np.int64).reshape(count, -1)
        assert self.cut.base is not None
        return next(iter(read_windows(self.cut.base.windows).values()))[
            :PROOF_WINDOWS
        ]  # no held-out text: no figure comes of this
