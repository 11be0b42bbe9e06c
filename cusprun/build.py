"""The stages of a build in order: recipe in, expert out. The one place that knows all rooms.

Each stage is kept by the content hash of what went in, so that an interrupted build goes on where it stopped and ends
with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from cusprun import __version__
from cusprun.allocation import default_align
from cusprun.anatomy import Anatomy, SlicedAnatomy
from cusprun.anatomy.sliced import describe_sliced
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.selection import read_texts
from cusprun.cut import Cut
from cusprun.dense import Dense, find_dense
from cusprun.exporters.artifacts import Artifacts
from cusprun.exporters.gguf_source import check_gguf_source
from cusprun.files import sha256_file
from cusprun.formats import format_of
from cusprun.preflight import Prepared, prepare
from cusprun.progress import say
from cusprun.recipe import Recipe
from cusprun.stages import Stages, sole_builder, sweep

PROOF_WINDOWS = 8
IMATRIX_STRIDE = 4  # of the calibration windows every fourth gives the importance matrix


def build(recipe: Recipe, *, upto: str = "expert") -> dict[str, Any]:
    """Builds the expert of ``recipe`` and returns its expert.json; ``upto`` "model" stops at the compacted folder.

    Raises one InvalidRequest with every precondition that does not hold, before any work; Failed where a step breaks.
    """
    prepared = prepare(recipe, artifacts=upto == "expert")
    if recipe.device_profile is not None:
        from cusprun.benchmarks.profile import read_profile

        read_profile(recipe.device_profile, prepared.sizes.anatomy, recipe.quant)
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
        self.artifacts = Artifacts(prepared, self.dense, self.stages, self.cut)
        if self.recipe.budget:
            from cusprun.benchmarks.offers import DeviceOffers

            self.cut.device = DeviceOffers(prepared, self.dense, self.stages, self.cut, self.artifacts)

    def run(self, upto: str) -> dict[str, Any]:
        if upto == "expert" and any(format_of(quant) == "gguf" for quant in self.recipe.quant):
            check_gguf_source(self.dense.folder)  # hours before its expert is written
        key = self.cut.run()
        if upto == "model":
            return self._expert([], None)
        artifacts = [self.artifacts.export(quant, key) for quant in self.quants]
        reports = {}
        if self.recipe.measure:
            frontier = self._frontier(artifacts) if self.recipe.against_quantization else None
            reports = {artifact["quant"]: self._measure(artifact, self.cut.text, frontier) for artifact in artifacts}
        card = self._expert(artifacts, reports.get(self.quants[0]))
        if reports:
            from cusprun.benchmarks.report_page import write_pages

            write_pages(self.out)
        return card

    @property
    def quants(self) -> Sequence[str]:
        """The types to write: of a budget the one that was found best."""
        return self.recipe.quant if self.cut.solved is None else (self.cut.solved["quant"],)

    # figures ---------------------------------------------------------------------------------------------------------

    def _frontier(self, artifacts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The expert's artifacts beside the dense model in every type."""
        from cusprun.benchmarks.contenders import REFERENCE, dense_name, every, expert_name
        from cusprun.benchmarks.environment import machine
        from cusprun.benchmarks.frontier import Candidate, compare

        recipe, dense = self.recipe, self.artifacts.dense_artifact
        texts, _ = read_texts(self.cut.texts_path)

        def run() -> dict[str, Any]:
            candidates = [
                Candidate(expert_name(self.prepared.name, entry["quant"]), self.out / entry["path"], "expert")
                for entry in artifacts
            ]
            types = every(recipe.rounding, {entry["format"] for entry in artifacts})
            candidates += [Candidate(dense_name(self.dense, quant), dense(quant), "dense") for quant in types]
            return compare(
                candidates, texts, reference=dense(REFERENCE), max_tokens=recipe.eval_tokens,
                repetitions=recipe.repetitions, threads=recipe.threads, device=recipe.device,
            )  # fmt: skip

        fields = recipe.key("eval_tokens", "repetitions", "threads", "device", "rounding", "tensor_type")
        inputs = [*(entry["sha256"] for entry in artifacts), self.dense.key, fields, sha256_file(self.cut.texts_path)]
        inputs.append(json.dumps(machine()))
        found: dict[str, Any] = self.stages.step("frontier", inputs, [], run)["value"]
        return found

    def _measure(
        self, artifact: dict[str, Any], text: dict[str, Any], frontier: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Dense and expert as shipped; writes the report of this artifact and returns it."""
        from cusprun.benchmarks import quality, report, samples, speed, tasks
        from cusprun.benchmarks.environment import machine
        from cusprun.benchmarks.kept_quality import evaluate_kept

        recipe, quant = self.recipe, artifact["quant"]
        expert, dense = self.out / artifact["path"], self.artifacts.dense_artifact(quant)
        texts, asked = read_texts(self.cut.texts_path)
        both = [artifact["sha256"], self.dense.key]
        threads, device = recipe.threads, recipe.device

        def run_speed() -> Any:
            rows = speed.bench(
                [expert, dense], repetitions=recipe.repetitions, threads=threads, device=device,
                kept=cache_folder() / "bench",
            )  # fmt: skip
            return [row.as_json() for row in rows]

        def run_quality() -> Any:
            pairs = evaluate_kept(
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

        prompts = samples.prompts(texts, asked)

        def run_samples() -> Any:
            return samples.sample_answers(expert, dense, prompts, threads=threads, device=device)

        step, here = self.stages.step, machine()
        timed = [*both, recipe.key("repetitions", "threads", "device"), json.dumps(here)]
        answered = [*both, sha256_file(self.cut.texts_path), json.dumps(here["versions"])]
        speeds = step(f"speed.{quant}", timed, [], run_speed)
        read = step(f"quality.{quant}", [*answered, recipe.key("eval_tokens")], [], run_quality)
        answers = step(f"questions.{quant}", answered, [], run_questions)["value"] if asked else []
        said = step(f"samples.{quant}", answered, [], run_samples)["value"] if prompts else []
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
            samples=said,
            frontier=frontier,
        )
        first = quant == self.quants[0]
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
            "budget": {name: value for name, value in asdict(recipe.budget).items() if value is not None} or None,
            "solved": self.cut.solved,
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
                "hub_id": self.dense.hub_id,
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
            "texts": [row for row in self.cut.text.get("corpora", []) if row["side"] == "calibration"],
            "artifacts": [dict(artifact) for artifact in artifacts],
            "figures": figures,
        }
        write_json(self.out / "expert.json", value)
        return value
