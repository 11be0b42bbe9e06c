"""The stages of a build in order: recipe in, expert out. The one place that knows all rooms.

Each stage is kept by the content hash of what went in, so that an interrupted build goes on where it stopped and ends
with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from cusprun import __version__
from cusprun.allocation import default_align
from cusprun.anatomy import Anatomy, SlicedAnatomy
from cusprun.anatomy.sliced import describe_sliced
from cusprun.checkpoint import load_tokenizer
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.selection import read_texts, read_windows
from cusprun.cut import Cut
from cusprun.dense import Dense, find_dense
from cusprun.files import sha256_file, written_whole
from cusprun.preflight import Prepared, model_name, prepare
from cusprun.progress import say
from cusprun.quants import TYPES, is_weighed, parse_override
from cusprun.recipe import Recipe
from cusprun.stages import VERSIONS, Stages, sole_builder, sweep

PROOF_WINDOWS = 8
IMATRIX_STRIDE = 4  # of the calibration windows every fourth gives the importance matrix


def build(recipe: Recipe, *, upto: str = "expert") -> dict[str, Any]:
    """Builds the expert of ``recipe`` and returns its expert.json; ``upto`` "model" stops at the compacted folder.

    Raises one InvalidRequest with every precondition that does not hold, before any work; Failed where a step breaks.
    """
    prepared = prepare(recipe, artifacts=upto == "expert")
    say(prepared.describe())
    with sole_builder(prepared.out):
        sweep(prepared.out)
        sweep(cache_folder())
        recipe.save(prepared.out / "recipe.yaml")
        return {**_Build(prepared).run(upto), "folder": str(prepared.out)}


class _Build:
    """One run through the stages."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.recipe = prepared.recipe
        self.out = prepared.out
        self.stages = Stages(prepared.out)
        self.dense: Dense = find_dense(self.recipe.model, self.recipe.revision)
        align = self.recipe.align or default_align(self.dense.anatomy, self.recipe.quant)
        self.cut = Cut(prepared, self.dense, self.stages, align)

    def run(self, upto: str) -> dict[str, Any]:
        key = self.cut.run()
        if upto == "model":
            return self._expert([], None)
        artifacts = [self._export(quant, key) for quant in self.recipe.quant]
        reports = {}
        if self.recipe.measure:
            reports = {artifact["quant"]: self._measure(artifact, self.cut.text) for artifact in artifacts}
        return self._expert(artifacts, reports.get(self.recipe.quant[0]))

    # artifacts -------------------------------------------------------------------------------------------------------

    def _export(self, quant: str, model_key: str) -> dict[str, Any]:
        path = self.out / "gguf" / f"{self.prepared.name}-{quant}.gguf"

        weighed = self.recipe.rounding == "imatrix" and is_weighed(quant)
        matrix = self._imatrix(model_key) if weighed else None
        overrides = self._overrides(quant)

        def write() -> dict[str, Any]:
            from cusprun.exporters.gguf import export_gguf
            from cusprun.exporters.proof import prove_gguf

            windows = self._proof_windows()
            with written_whole(path) as part:  # under its own name only once llama.cpp has answered as torch does
                candidate = part.with_name(f"{part.name}.gguf")  # a name that a later build sweeps away
                try:
                    report = export_gguf(
                        self.out / "model", candidate, quant, name=self.prepared.name, metadata=self._metadata(),
                        imatrix=matrix, overrides=overrides,
                    )  # fmt: skip
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
                "rounding": "imatrix" if weighed else "nearest",
                "fallbacks": [asdict(fallback) for fallback in report.fallbacks],
                "proof": proof.as_dict(),
            }

        names = json.dumps([self.prepared.name, self._metadata()], sort_keys=True)
        keys = [model_key, names, *self.recipe.tensor_type, *([sha256_file(matrix)] if matrix else [])]
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

    def _take_imatrix(self, folder: Path, windows: Path, path: Path) -> None:
        from cusprun.exporters.imatrix import collect_imatrix, write_imatrix

        texts = {name: ids[::IMATRIX_STRIDE] for name, ids in read_windows(windows).items()}
        write_imatrix(path, collect_imatrix(folder, texts, self.recipe.device), list(texts))

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

    def _metadata(self) -> dict[str, str]:
        scenario = self.prepared.scenario
        values = {
            "license": self.dense.licence,
            "base_model": self.dense.id,
            "languages": scenario.language,
            "tags": ", ".join(["cusprun", *scenario.given().values()]),
            "cusprun.method": self.recipe.method,
            "cusprun.version": __version__,
        }
        return {key: value for key, value in values.items() if value}

    def _dense_gguf(self, quant: str) -> Path:
        """The dense model at the same type, rounded in the same way; written once for all builds on the same text."""
        from cusprun.exporters.gguf import export_gguf

        name = model_name(self.dense.id)
        folder = cache_folder() / "dense-gguf" / f"{self.dense.key[:16]}-{VERSIONS['gguf']}"
        matrix, overrides = None, self._overrides(quant)
        if overrides:
            name += "-" + hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]
        if self.recipe.rounding == "imatrix" and is_weighed(quant):
            text = sha256_file(self.cut.windows_path)[:16]
            matrix, name = folder / f"{name}-{text}.imatrix", f"{name}-{text}"
            if not matrix.is_file():
                self._take_imatrix(self.dense.folder, self.cut.windows_path, matrix)
        path = folder / f"{name}-{quant}.gguf"
        if not path.is_file():
            export_gguf(
                self.dense.folder, path, quant, name=model_name(self.dense.id), imatrix=matrix, overrides=overrides
            )
        return path

    # figures ---------------------------------------------------------------------------------------------------------

    def _measure(self, artifact: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
        """Dense and expert as shipped; writes the report of this artifact and returns it."""
        from cusprun.benchmarks import quality, report, speed, tasks

        recipe, quant = self.recipe, artifact["quant"]
        expert, dense = self.out / artifact["path"], self._dense_gguf(quant)
        texts, asked = read_texts(self.cut.texts_path)
        both = [artifact["sha256"], self.dense.key]
        threads, device = recipe.threads, recipe.device

        def run_speed() -> Any:
            rows = speed.bench([expert, dense], repetitions=recipe.repetitions, threads=threads, device=device)
            return [row.as_json() for row in rows]

        def run_quality() -> Any:
            pairs = quality.evaluate_corpora(
                expert,
                texts,
                against=dense,
                max_tokens=recipe.eval_tokens,
                special=True,
                threads=threads,
                device=device,
            )
            return {name: asdict(pair) for name, pair in pairs.items()}

        def run_questions() -> Any:
            results = [tasks.multiple_choice(path, asked, threads=threads, device=device) for path in (expert, dense)]
            return [result.as_json() for result in results]

        step, read_text = self.stages.step, sha256_file(self.cut.texts_path)
        speeds = step(f"speed.{quant}", [*both, recipe.key("repetitions", "threads", "device")], [], run_speed)
        read = step(f"quality.{quant}", [*both, recipe.key("eval_tokens"), read_text], [], run_quality)
        answers = step(f"questions.{quant}", [*both, read_text], [], run_questions)["value"] if asked else []
        plan = self.cut.plan
        assert plan is not None  # a method without a plan has no artifact to measure
        whole = report.build_report(
            scenario={**self.prepared.scenario.given(), "name": self.prepared.name},
            method=self._method(),
            before=plan.dense.layers,
            after=plan.widths,
            speed=TypeAdapter(list[speed.BenchRow]).validate_python(speeds["value"]),
            quality=TypeAdapter(dict[str, quality.QualityPair]).validate_python(read["value"]),
            tasks={"questions": TypeAdapter(tuple[tasks.McResult, tasks.McResult]).validate_python(answers)}
            if answers
            else {},
            corpora=text["corpora"],
            stages=self.stages.seconds(),
            proofs=[{"path": artifact["path"], **artifact["proof"]}],
        )
        first = quant == recipe.quant[0]
        report.write_report(self.out / "report" if first else self.out / "report" / quant, whole)
        return whole

    def _method(self) -> dict[str, Any]:
        recipe, expert = self.recipe, self.expert
        return {
            "name": recipe.method,
            "combine": recipe.combined,
            "ratio": recipe.removed_share,
            "epsilon": recipe.epsilon,
            "layout": self.prepared.limits.layout,
            "align": self.cut.align,
            "calibration_tokens": recipe.tokens,
            "general_share": recipe.general,
            "widths": recipe.cuts_by if recipe.method == "refit" else None,
            "form": recipe.form if recipe.method == "refit" else None,
            "vocabulary": {"dense": self.dense.anatomy.vocab_size, "expert": expert.vocab_size},
            "predicted_nats_per_token": self.cut.predicted,
            "recover": self.cut.recovery,
            "removed_share": 1 - expert.parameters / self.dense.anatomy.parameters,
            "weights_note": self.dense.weights_note,
        }

    @property
    def expert(self) -> Anatomy | SlicedAnatomy:
        """Sizes of what came out."""
        return self.cut.plan.expert if self.cut.plan is not None else describe_sliced(self.out / "model")

    def _expert(self, artifacts: Sequence[Mapping[str, Any]], report: dict[str, Any] | None) -> dict[str, Any]:
        """Writes expert.json and returns it."""
        from cusprun.files import write_json

        plan, expert = self.cut.plan, self.expert
        figures = None
        if report is not None:
            from cusprun.benchmarks.report import figures as select

            figures = select(report)
        value = {
            "schema_version": 1,
            "name": self.prepared.name,
            "cusprun": __version__,
            "scenario": self.prepared.scenario.given(),
            "base": {
                "id": self.dense.id,
                "sha256": self.dense.sha256,
                "parameters": self.dense.anatomy.parameters,
                "bytes": self.dense.bytes,
                "licence": self.dense.licence,
            },
            "expert": {
                "parameters": expert.parameters,
                "bytes": sum(file.stat().st_size for file in (self.out / "model").glob("*.safetensors")),
                "macs_per_token": expert.macs_per_token,
                "vocabulary": expert.vocab_size,
                "widths": plan.counts() if plan is not None else [],
            },
            "method": self._method(),
            "artifacts": [dict(artifact) for artifact in artifacts],
            "figures": figures,
        }
        write_json(self.out / "expert.json", value)
        return value
