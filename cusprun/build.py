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
from cusprun.allocation import default_align, plan_epsilon, plan_ratio, score_layers
from cusprun.checkpoint import Weights, load_tokenizer
from cusprun.compact import compact
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.selection import Selection, read_texts, read_windows
from cusprun.dense import Dense, find_dense
from cusprun.files import sha256_file, written_whole
from cusprun.plan import Plan
from cusprun.preflight import Prepared, model_name, prepare
from cusprun.progress import say
from cusprun.recipe import Recipe
from cusprun.stages import Stages, sole_builder, sweep
from cusprun.statistics import load_statistics, save_statistics, stream

# Raise a stage's number when what it writes from the same inputs changes.
VERSIONS = {
    "text": 1,
    "statistics": 2,
    "plan": 1,
    "refit": 1,
    "model": 1,
    "gguf": 1,
    "quality": 1,
    "questions": 1,
    "speed": 1,
}
PROOF_WINDOWS = 8
WIDTHS_STRIDE = 4  # with refit, every fourth window gives the widths


def build(recipe: Recipe, *, upto: str = "expert") -> dict[str, Any]:
    """Builds the expert of ``recipe`` and returns its expert.json; ``upto`` "model" stops at the compacted folder.

    Raises one InvalidRequest with every precondition that does not hold, before any work; Failed where a step breaks.
    """
    from cusprun.exporters.gguf import QUANTS

    prepared = prepare(recipe, tuple(QUANTS))
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
        self.align = self.recipe.align or default_align(self.dense.anatomy, self.recipe.quant)

    def run(self, upto: str) -> dict[str, Any]:
        text = self._text()
        plan = self._planned(text)
        model = self.stage("model", [plan["key"]], [self.out / "model"], lambda: self._compact(plan["value"]))
        if upto == "model":
            return self._expert([], None)
        artifacts = [self._export(quant, model["key"]) for quant in self.recipe.quant]
        reports = {}
        if self.recipe.measure:
            reports = {artifact["quant"]: self._measure(artifact, text["value"]) for artifact in artifacts}
        return self._expert(artifacts, reports.get(self.recipe.quant[0]))

    def stage(self, name: str, inputs: Sequence[str], outputs: Sequence[Path], work: Any) -> dict[str, Any]:
        """Runs a stage; ``inputs`` are hashes. Returns its key and its value."""
        version = VERSIONS[name.split(".")[0]]
        key = hashlib.sha256(json.dumps([name, version, *inputs]).encode()).hexdigest()
        return {"key": key, "value": self.stages.run(name, key, outputs, work)}

    # text ------------------------------------------------------------------------------------------------------------

    @property
    def windows_path(self) -> Path:
        return self.stages.folder / "windows.safetensors"

    @property
    def texts_path(self) -> Path:
        return self.stages.folder / "texts.jsonl"

    def _text(self) -> dict[str, Any]:
        """Calibration windows by dimension and the held-out texts."""
        prepared, recipe = self.prepared, self.recipe
        selection = Selection(
            prepared.scenario, prepared.own, prepared.dims, recipe.include,
            recipe.tokens, recipe.window, recipe.questions, recipe.seed,
        )  # fmt: skip

        def select() -> dict[str, Any]:
            return selection.write(load_tokenizer(self.dense.folder), self.windows_path, self.texts_path)

        inputs = [selection.key(), self.dense.key]
        return self.stage("text", inputs, [self.windows_path, self.texts_path], select)

    # the cut ---------------------------------------------------------------------------------------------------------

    def _planned(self, text: dict[str, Any]) -> dict[str, Any]:
        statistics_path = self.stages.folder / "statistics"

        # Refit chooses the units from all the text; the widths of the layers need less of it.
        stride = WIDTHS_STRIDE if self.recipe.method == "refit" else 1

        def take() -> None:
            windows = {name: ids[::stride] for name, ids in read_windows(self.windows_path).items()}
            found = stream(self.dense.folder, self.dense.anatomy, windows, device=self.recipe.device)
            save_statistics(found, statistics_path)

        seen = self.stage(
            "statistics", [text["key"], self.dense.key, self.recipe.device, str(stride)], [statistics_path], take
        )
        fields = self.recipe.key("combine", "ratio", "epsilon", "layout")
        inputs = [seen["key"], fields, self.criterion, str(self.align)]
        planned = self.stage("plan", inputs, [], lambda: self._plan(statistics_path).to_json())
        if self.recipe.method != "refit":
            return planned

        def repair() -> dict[str, Any]:
            from cusprun.refit import refit

            plan = Plan.from_json(planned["value"], self.dense.anatomy)
            windows = read_windows(self.windows_path)
            return refit(self.dense.folder, plan, windows, self.refitted_path, device=self.recipe.device).to_json()

        return self.stage("refit", [planned["key"], self.recipe.device], [self.refitted_path], repair)

    @property
    def criterion(self) -> str:
        """What scores the neurons: refit takes its widths from Cus-Prun and chooses the units anew."""
        return "cus-prun" if self.recipe.method == "refit" else self.recipe.method

    @property
    def refitted_path(self) -> Path:
        return self.stages.folder / "refitted"

    def _plan(self, statistics_path: Path) -> Plan:
        recipe, anatomy = self.recipe, self.dense.anatomy
        scores = score_layers(
            Weights(self.dense.folder), anatomy, load_statistics(statistics_path), self.criterion, recipe.combine
        )
        if recipe.removed_share is None:
            assert recipe.epsilon is not None
            return plan_epsilon(anatomy, scores, recipe.epsilon, align=self.align, layout=recipe.layout)
        return plan_ratio(anatomy, scores, recipe.removed_share, align=self.align, layout=recipe.layout)

    def _compact(self, planned: dict[str, Any]) -> None:
        plan = Plan.from_json(planned, self.dense.anatomy)
        say(
            f"removes {plan.removed_share:.1%} of {plan.dense.parameters / 1e6:.1f} M parameters; "
            f"{plan.expert.parameters / 1e6:.1f} M stay"
        )
        note = {"base": self.dense.id, "method": self.recipe.method, "scenario": str(self.prepared.scenario)}
        refitted = self.refitted_path if self.recipe.method == "refit" else None
        compact(self.dense.folder, plan, self.out / "model", refitted=refitted, note=note)

    @property
    def plan(self) -> Plan:
        name = "refit" if self.recipe.method == "refit" else "plan"
        record = json.loads((self.stages.folder / f"{name}.json").read_text(encoding="utf-8"))
        return Plan.from_json(record["value"], self.dense.anatomy)

    # artifacts -------------------------------------------------------------------------------------------------------

    def _export(self, quant: str, model_key: str) -> dict[str, Any]:
        path = self.out / "gguf" / f"{self.prepared.name}-{quant}.gguf"

        def write() -> dict[str, Any]:
            from cusprun.exporters.gguf import export_gguf
            from cusprun.exporters.proof import prove_gguf

            windows = self._proof_windows()
            with written_whole(path) as part:  # under its own name only once llama.cpp has answered as torch does
                candidate = part.with_name(f"{part.name}.gguf")  # a name that a later build sweeps away
                try:
                    report = export_gguf(
                        self.out / "model", candidate, quant, name=self.prepared.name, metadata=self._metadata()
                    )
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
                "fallbacks": [asdict(fallback) for fallback in report.fallbacks],
                "proof": proof.as_dict(),
            }

        names = json.dumps([self.prepared.name, self._metadata()], sort_keys=True)
        exported = self.stage(f"gguf.{quant}", [model_key, names], [path], write)
        value: dict[str, Any] = exported["value"]
        return value

    def _proof_windows(self) -> np.ndarray:
        """Held-out text in windows, for the comparison with torch."""
        texts, _ = read_texts(self.texts_path)
        tokenizer = load_tokenizer(self.dense.folder)
        ids: list[int] = []
        for document in next(iter(texts.values()), []):
            ids += tokenizer(document, add_special_tokens=False)["input_ids"]
            if len(ids) >= PROOF_WINDOWS * self.recipe.window:
                break
        count = min(PROOF_WINDOWS, len(ids) // self.recipe.window)
        if count:
            return np.array(ids[: count * self.recipe.window], dtype=np.int64).reshape(count, -1)
        return next(iter(read_windows(self.windows_path).values()))[
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
        """The dense model at the same type, written once for all builds."""
        from cusprun.exporters.gguf import export_gguf

        name = model_name(self.dense.id)
        folder = cache_folder() / "dense-gguf" / f"{self.dense.key[:16]}-{VERSIONS['gguf']}"
        path = folder / f"{name}-{quant}.gguf"
        if not path.is_file():
            export_gguf(self.dense.folder, path, quant, name=name)
        return path

    # figures ---------------------------------------------------------------------------------------------------------

    def _measure(self, artifact: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
        """Dense and expert as shipped; writes the report of this artifact and returns it."""
        from cusprun.benchmarks import quality, report, speed, tasks

        recipe, quant = self.recipe, artifact["quant"]
        expert, dense = self.out / artifact["path"], self._dense_gguf(quant)
        texts, asked = read_texts(self.texts_path)
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

        speeds = self.stage(f"speed.{quant}", [*both, recipe.key("repetitions", "threads", "device")], [], run_speed)
        read = self.stage(
            f"quality.{quant}", [*both, recipe.key("eval_tokens"), sha256_file(self.texts_path)], [], run_quality
        )
        answers = (
            self.stage(f"questions.{quant}", [*both, sha256_file(self.texts_path)], [], run_questions)["value"]
            if asked
            else []
        )
        plan = self.plan
        whole = report.build_report(
            scenario={**self.prepared.scenario.given(), "name": self.prepared.name},
            method=self._method(plan),
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

    def _method(self, plan: Plan) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "name": recipe.method,
            "combine": recipe.combine,
            "ratio": recipe.removed_share,
            "epsilon": recipe.epsilon,
            "layout": recipe.layout,
            "align": self.align,
            "calibration_tokens": recipe.tokens,
            "removed_share": plan.removed_share,
            "weights_note": self.dense.weights_note,
        }

    def _expert(self, artifacts: Sequence[Mapping[str, Any]], report: dict[str, Any] | None) -> dict[str, Any]:
        """Writes expert.json and returns it."""
        from cusprun.files import write_json

        plan = self.plan
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
                "parameters": plan.dense.parameters,
                "bytes": self.dense.bytes,
                "licence": self.dense.licence,
            },
            "expert": {
                "parameters": plan.expert.parameters,
                "bytes": sum(file.stat().st_size for file in (self.out / "model").glob("*.safetensors")),
                "macs_per_token": plan.expert.macs_per_token,
                "widths": plan.counts(),
            },
            "method": self._method(plan),
            "artifacts": [dict(artifact) for artifact in artifacts],
            "figures": figures,
        }
        write_json(self.out / "expert.json", value)
        return value
