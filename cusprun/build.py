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
from cusprun.checkpoint import Weights
from cusprun.compact import compact
from cusprun.corpora import Document, WeightedDocument, fingerprint
from cusprun.corpora.cache import cache_folder
from cusprun.corpora.catalog import load_catalog
from cusprun.corpora.packing import pack_windows, render
from cusprun.corpora.sampling import dimension_corpora, evaluation_texts, questions
from cusprun.dense import Dense, find_dense
from cusprun.files import sha256_file, written_whole
from cusprun.importance import LayerMatrices, find_criterion
from cusprun.importance.combine import combine_layer
from cusprun.plan import Plan, default_align, plan_epsilon, plan_ratio
from cusprun.preflight import Prepared, prepare
from cusprun.progress import say
from cusprun.recipe import Recipe
from cusprun.stages import Stages, sole_builder, sweep
from cusprun.statistics import collect, load_statistics, save_statistics

# Raise a stage's number when what it writes from the same inputs changes.
VERSIONS = {"text": 1, "statistics": 1, "plan": 1, "model": 1, "gguf": 1, "quality": 1, "questions": 1, "speed": 1}
PROOF_WINDOWS = 8


def build(recipe: Recipe, *, upto: str = "expert") -> dict[str, Any]:
    """Builds the expert of ``recipe`` and returns its expert.json; ``upto`` "model" stops at the compacted folder.

    Raises one InvalidRequest with every precondition that does not hold, before any work; Failed where a step breaks.
    """
    from cusprun.exporters.gguf import QUANTS

    prepared = prepare(recipe, tuple(QUANTS))
    say(prepared.describe())
    with sole_builder(prepared.out):
        sweep(prepared.out)
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
        text = self.stage("text", [self._text_inputs()], [self.windows_path, self.texts_path], self._text)
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

    def _text_inputs(self) -> str:
        own = [sha256_path(text.path) + str(text.weight) for text in self.prepared.own]
        dims = {name: sha256_path(path) for name, path in self.prepared.dims.items()}
        catalog = [entry.model_dump(mode="json", exclude={"tried"}) for entry in load_catalog()]
        fields = self.recipe.key("lang", "domain", "task", "include", "tokens", "window", "seed")
        tokenizer = sha256_file(self.dense.folder / "tokenizer.json")
        return json.dumps([fields, own, dims, catalog, tokenizer], sort_keys=True)

    def _text(self) -> dict[str, Any]:
        """Calibration windows by dimension and the held-out texts; returns what they were made of."""
        from safetensors.numpy import save_file
        from transformers import AutoTokenizer

        prepared, recipe = self.prepared, self.recipe
        tokenizer = AutoTokenizer.from_pretrained(self.dense.folder)
        corpora = dimension_corpora(prepared.scenario, prepared.own, prepared.dims, named=recipe.include)
        share = recipe.tokens // len(corpora)
        windows = {
            name: pack_windows(documents, tokenizer, share, recipe.window, recipe.seed)
            for name, documents in corpora.items()
        }
        texts = evaluation_texts(prepared.scenario, prepared.own, prepared.dims, named=recipe.include)
        asked = questions(prepared.scenario, prepared.own, named=recipe.include)
        with written_whole(self.windows_path) as part:
            save_file(windows, part)
        with written_whole(self.texts_path) as part, part.open("w", encoding="utf-8") as file:
            for name, documents in texts.items():
                shuffled = sorted(documents, key=_scatter)
                rendered = [render(document, tokenizer) for document in shuffled]
                file.write(json.dumps({"text": name, "documents": rendered}, ensure_ascii=False) + "\n")
            chosen = sorted(asked, key=_scatter)[: recipe.questions]
            for document in chosen:
                if document.question is not None:
                    file.write(json.dumps({"question": asdict(document.question)}, ensure_ascii=False) + "\n")
        rows = [
            _corpus_row(name, "calibration", documents, int(windows[name].size)) for name, documents in corpora.items()
        ]
        rows += [_corpus_row(name, "held-out", documents, None) for name, documents in texts.items()]
        return {"corpora": [row for group in rows for row in group], "questions": len(chosen)}

    def read_windows(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        windows = load_file(self.windows_path)
        return {name: windows[name] for name in sorted(windows)}

    def read_texts(self) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
        """Held-out texts by name, rendered, and the questions."""
        texts, asked = {}, []
        with self.texts_path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if "question" in row:
                    asked.append(row["question"])
                else:
                    texts[row["text"]] = row["documents"]
        return texts, asked

    # the cut ---------------------------------------------------------------------------------------------------------

    def _planned(self, text: dict[str, Any]) -> dict[str, Any]:
        statistics_path = self.stages.folder / "statistics.safetensors"

        def take() -> None:
            windows = self.read_windows()
            found = collect(self.dense.folder, self.dense.anatomy, windows, device=self.recipe.device)
            save_statistics(found, statistics_path)

        seen = self.stage("statistics", [text["key"], self.dense.sha256, self.recipe.device], [statistics_path], take)
        fields = self.recipe.key("method", "combine", "ratio", "epsilon", "layout")
        return self.stage(
            "plan", [seen["key"], fields, str(self.align)], [], lambda: self._plan(statistics_path).to_json()
        )

    def _plan(self, statistics_path: Path) -> Plan:
        recipe, anatomy = self.recipe, self.dense.anatomy
        criterion, weights = find_criterion(recipe.method), Weights(self.dense.folder)
        scores = []
        for index, seen in enumerate(load_statistics(statistics_path)):
            prefix = anatomy.prefix(index)
            matrices = LayerMatrices(
                down=weights[f"{prefix}mlp.down_proj.weight"], output=weights[f"{prefix}self_attn.o_proj.weight"]
            )
            scores.append(combine_layer(seen, matrices, criterion, recipe.combine, {}))
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
        compact(self.dense.folder, plan, self.out / "model", note=note)

    @property
    def plan(self) -> Plan:
        record = json.loads((self.stages.folder / "plan.json").read_text(encoding="utf-8"))
        return Plan.from_json(record["value"], self.dense.anatomy)

    # artifacts -------------------------------------------------------------------------------------------------------

    def _export(self, quant: str, model_key: str) -> dict[str, Any]:
        path = self.out / "gguf" / f"{self.prepared.name}-{quant}.gguf"

        def write() -> dict[str, Any]:
            from cusprun.exporters.gguf import export_gguf
            from cusprun.exporters.proof import prove_gguf

            windows = self._proof_windows()
            with written_whole(path) as part:  # under its own name only once llama.cpp has answered as torch does
                candidate = part.with_suffix(".gguf")
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
        from transformers import AutoTokenizer

        texts, _ = self.read_texts()
        tokenizer = AutoTokenizer.from_pretrained(self.dense.folder)
        ids: list[int] = []
        for document in next(iter(texts.values()), []):
            ids += tokenizer(document, add_special_tokens=False)["input_ids"]
            if len(ids) >= PROOF_WINDOWS * self.recipe.window:
                break
        count = min(PROOF_WINDOWS, len(ids) // self.recipe.window)
        if count:
            return np.array(ids[: count * self.recipe.window], dtype=np.int64).reshape(count, -1)
        return next(iter(self.read_windows().values()))[:PROOF_WINDOWS]  # no held-out text: no figure comes of this

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

        name = self.dense.id.rstrip("/").split("/")[-1].removesuffix(".gguf").lower()
        folder = cache_folder() / "dense-gguf" / f"{self.dense.sha256[:16]}-{VERSIONS['gguf']}"
        path = folder / f"{name}-{quant}.gguf"
        if not path.is_file():
            export_gguf(self.dense.folder, path, quant, name=name)
        return path

    # figures ---------------------------------------------------------------------------------------------------------

    def _measure(self, artifact: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
        """Dense and expert as shipped; writes the report of this artifact and returns it."""
        from cusprun.benchmarks import quality, report, speed, tasks
        from cusprun.corpora import Question

        recipe, quant = self.recipe, artifact["quant"]
        expert, dense = self.out / artifact["path"], self._dense_gguf(quant)
        texts, asked = self.read_texts()
        found = [Question(one["prompt"], tuple(one["choices"]), one["answer"]) for one in asked]
        both = [artifact["sha256"], self.dense.sha256]
        threads = {"threads": recipe.threads, "device": recipe.device}

        def run_speed() -> Any:
            rows = speed.bench([expert, dense], repetitions=recipe.repetitions, **threads)
            return [row.as_json() for row in rows]

        def run_quality() -> Any:
            pairs = quality.evaluate_corpora(
                expert, texts, against=dense, max_tokens=recipe.eval_tokens, special=True, **threads
            )
            return {name: asdict(pair) for name, pair in pairs.items()}

        def run_questions() -> Any:
            return [tasks.multiple_choice(path, found, **threads).as_json() for path in (expert, dense)]

        speeds = self.stage(f"speed.{quant}", [*both, recipe.key("repetitions", "threads", "device")], [], run_speed)
        read = self.stage(
            f"quality.{quant}", [*both, recipe.key("eval_tokens"), sha256_file(self.texts_path)], [], run_quality
        )
        answers = (
            self.stage(f"questions.{quant}", [*both, sha256_file(self.texts_path)], [], run_questions)["value"]
            if found
            else []
        )
        plan = self.plan
        whole = report.build_report(
            scenario={**self.prepared.scenario.given(), "name": self.prepared.name},
            method=self._method(plan),
            before=plan.dense.layers,
            after=plan.expert.layers,
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


def _scatter(document: Document) -> str:
    """A fixed order that mixes entries, so that the first tokens of a text are a sample of all of it."""
    return hashlib.sha256(document.id.encode()).hexdigest()


def _corpus_row(
    name: str, side: str, documents: Sequence[Document | WeightedDocument], tokens: int | None
) -> list[dict[str, Any]]:
    """One row for each entry that a text draws on."""
    entries = {entry.name: entry for entry in load_catalog()}
    plain = [item.document if isinstance(item, WeightedDocument) else item for item in documents]
    rows = []
    for entry in sorted({document.entry for document in plain}):
        known = entries.get(entry)
        rows.append(
            {
                "text": name,
                "side": side,
                "entry": entry,
                "documents": sum(document.entry == entry for document in plain),
                "tokens_of_text": tokens,
                "licence": known.licence if known else "the user's own",
                "attribution": known.attribution if known else None,
                "source": f"{known.source.kind}:{known.source.package}@{known.source.version}" if known else None,
                "sha256": fingerprint([document for document in plain if document.entry == entry]),
            }
        )
    return rows


def sha256_path(path: Path) -> str:
    """sha256 of a file, or of a folder's files."""
    from cusprun.files import sha256_tree

    return sha256_tree(path) if path.is_dir() else sha256_file(path)
