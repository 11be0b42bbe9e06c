"""What a build exports: the expert in every type that was asked for, each proved, and the dense model beside it."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cusprun import __version__
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.selection import read_aside, read_texts, read_windows
from cusprun.cut import Cut
from cusprun.dense import Dense
from cusprun.exporters.compensation import Roundings
from cusprun.exporters.dense_artifacts import DenseArtifacts, onnx_settings, sample_windows, take_imatrix
from cusprun.files import folder_written_whole, sha256_file, written_whole
from cusprun.formats import Rounding, format_of, rounding_of
from cusprun.preflight import Prepared
from cusprun.quants import TYPES, is_weighed, parse_override
from cusprun.stages import VERSIONS, Stages

if TYPE_CHECKING:
    from cusprun.exporters.proof import Proof

PROOF_WINDOWS = 8
ROUNDING_WINDOWS = 12  # that what a type loses by itself is measured on


class Artifacts:
    """Exports of one build; each is a stage."""

    def __init__(self, prepared: Prepared, dense: Dense, stages: Stages, cut: Cut) -> None:
        self.prepared, self.recipe, self.out = prepared, prepared.recipe, prepared.out
        self.dense, self.stages, self.cut = dense, stages, cut
        aside, device = stages.folder, self.recipe.device
        self._expert_rounded = Roundings(self.out / "model", lambda: sample_windows(self._own_windows()), aside, device)
        self._dense = DenseArtifacts.of(self.recipe, dense, cut.windows_path, aside)

    def export(self, quant: str, model_key: str) -> dict[str, Any]:
        """Writes and proves the expert in one type; its entry in expert.json."""
        return (self._gguf if format_of(quant) == "gguf" else self._onnx)(quant, model_key)

    def dense_artifact(self, quant: str) -> Path:
        """The dense model in the same type, rounded in the same way; written once for all builds on the same text."""
        return self._dense.artifact(quant)

    def file_bytes(self, folder: Path, quant: str, *, exact: bool = True) -> int:
        """Bytes of the artifact that the model ``folder``, which may be hollow, becomes in one type.

        Of an ONNX folder without ``exact`` those of weights and tokenizer alone; with it, the folder is written.
        """
        if format_of(quant) == "gguf":
            from cusprun.exporters.gguf import GgufExport

            weighed = self._rounding(quant) != "nearest" and is_weighed(quant)
            export = GgufExport(
                folder, quant, name=self.prepared.name, metadata=self._metadata(), overrides=self._overrides(quant),
                weighed=weighed,
            )  # fmt: skip
            return export.prediction.bytes
        from cusprun.exporters.onnx import OnnxExport

        planned = OnnxExport(folder, quant, name=self.prepared.name, **onnx_settings(self.recipe))
        if exact:
            with tempfile.TemporaryDirectory(prefix="cusprun-size-") as scratch:
                return planned.write(Path(scratch) / quant).bytes
        return planned.prediction.bytes

    def rounding_proof(self, quant: str) -> Proof:
        """How far the dense model in one type is from itself, on calibration-side text that is set aside."""
        from cusprun.exporters.proof import prove_gguf, prove_onnx

        found = read_aside(self.cut.windows_path) or read_windows(self.cut.windows_path)
        turns = [
            ids[turn] for turn in range(max(map(len, found.values()))) for ids in found.values() if turn < len(ids)
        ]
        windows, path = np.stack(turns[:ROUNDING_WINDOWS]), self.dense_artifact(quant)
        settings: dict[str, Any] = {"strict": False, "threads": self.recipe.threads}
        if format_of(quant) == "gguf":
            return prove_gguf(path, self.dense.folder, windows, **settings)
        return prove_onnx(path, self.dense.folder, quant, windows, **settings)

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
            "imatrix",
            [model_key, base.key],
            [path],
            lambda: take_imatrix(self.out / "model", base.windows, path, self.recipe.device),
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

    def _metadata(self) -> dict[str, str | list[str]]:
        from cusprun.exporters.gguf_card import read_card

        scenario, dense = self.prepared.scenario, self.dense
        card, corpora = read_card(dense.folder), self.cut.text.get("corpora", [])
        values: dict[str, str | list[str] | None] = {
            **{key: card[key] for key in ("license_name", "license_link") if key in card},
            "license": dense.licence,
            "base_model": [dense.hub_id or Path(dense.id).name],
            "languages": [scenario.language] if scenario.language else [],
            "tags": ["cusprun", *scenario.given().values()],
            "datasets": sorted({row["entry"] for row in corpora if row["side"] == "calibration" and row["source"]}),
            "cusprun.method": self.recipe.method,
            "cusprun.version": __version__,
        }
        return {key: value for key, value in values.items() if value}

    # ONNX ------------------------------------------------------------------------------------------------------------

    def _onnx(self, quant: str, model_key: str) -> dict[str, Any]:
        path = self.out / "onnx" / quant
        settings, rounding = onnx_settings(self.recipe), self._rounding(quant)

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
