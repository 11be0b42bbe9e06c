"""What a build may choose from to meet a budget: types, their tables of bytes, seconds and memory, their own loss."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from cusprun.additive import Table, variants
from cusprun.anatomy import LayerWidths
from cusprun.benchmarks.environment import machine
from cusprun.benchmarks.profile import Profile, at_present, fewer_rows, read_profile, take_profile
from cusprun.cut import Cut
from cusprun.dense import Dense
from cusprun.exporters.artifacts import Artifacts
from cusprun.exporters.hollow import write_hollow
from cusprun.files import sha256_file
from cusprun.formats import bits_of
from cusprun.preflight import Prepared
from cusprun.progress import say
from cusprun.solver import TypeOffer
from cusprun.stages import VERSIONS, Stages

SMALLER = 0.03  # a type whose file is not smaller by this share than one of more bits is not tried


class DeviceOffers:
    """The offers of one build; what is measured is kept as stages, what holds for the device in the cache."""

    def __init__(self, prepared: Prepared, dense: Dense, stages: Stages, cut: Cut, artifacts: Artifacts) -> None:
        self.prepared, self.recipe, self.dense = prepared, prepared.recipe, dense
        self.stages, self.cut, self.artifacts = stages, cut, artifacts

    def key(self) -> str:
        """What a solved plan depends on: with speed or memory in the wish, this machine too."""
        recipe = self.recipe
        here = recipe.budget.timed and recipe.device_profile is None
        return self._key() + (json.dumps(machine()) if here else "")

    def _key(self) -> str:
        recipe = self.recipe
        fields = recipe.key("quant", "rounding", "tensor_type", "block_size", "zero_points", "output_bits", "threads")
        given = sha256_file(recipe.device_profile) if recipe.device_profile is not None else ""
        versions = [VERSIONS[name] for name in ("gguf", "onnx", "gptq", "rounding")]
        return hashlib.sha256(json.dumps([fields, given, versions]).encode()).hexdigest()

    def offers(self) -> list[TypeOffer]:
        """One for each type of the recipe, without those that another makes superfluous."""
        sizes: dict[str, Table] = {quant: self._sizes(quant) for quant in self.recipe.quant}
        quants = list(sizes) if self.recipe.budget.timed else worth_trying({q: t.whole for q, t in sizes.items()})
        profile = self._profile(quants) if self.recipe.budget.timed else None
        return [
            TypeOffer(
                quant,
                partial(self._rounding, quant),
                sizes[quant],
                profile.types[quant].seconds if profile is not None else None,
                profile.types[quant].memory if profile is not None else None,
            )
            for quant in quants
        ]

    def file_bytes(self, quant: str, layers: Sequence[LayerWidths | None], kept: Sequence[int] | None) -> int:
        anatomy = self.dense.anatomy.with_layers(layers)
        if kept is not None:
            anatomy = anatomy.with_vocabulary(len(kept))
        with tempfile.TemporaryDirectory(prefix="cusprun-size-") as scratch:
            folder = Path(scratch) / "model"
            write_hollow(self.dense.folder, anatomy, folder, kept)
            return self.artifacts.file_bytes(folder, quant)

    @cached_property
    def _fewer_rows(self) -> list[int]:
        return fewer_rows(self.dense.folder, self.dense.anatomy)

    def _sizes(self, quant: str) -> Table:
        """Bytes of the file, by dry runs on hollow models."""
        anatomy, folder = self.dense.anatomy, self.dense.folder

        def take() -> dict[str, object]:
            kept = fewer_rows(folder, anatomy)
            shapes = variants(
                anatomy,
                align=self.cut.align,
                attention_goes=self.cut.limits.attention_goes,
                rows=len(kept),
                linear=True,
            )
            found = {}
            with tempfile.TemporaryDirectory(prefix="cusprun-size-") as scratch:
                for number, (name, sizes) in enumerate(shapes.items()):
                    hollow = Path(scratch) / str(number)
                    fewer = sizes.vocab_size < anatomy.vocab_size
                    write_hollow(folder, sizes, hollow, kept if fewer else None)
                    found[name] = self.artifacts.file_bytes(hollow, quant, exact=False)
            return Table.of(shapes, found).to_json()

        name = f"sizes.{quant}"
        inputs = [self.dense.key, self._key(), self.cut.limits.key(), str(self.cut.align), self.prepared.name]
        return Table.from_json(self.stages.step(name, inputs, [], take)["value"])

    def _profile(self, quants: Sequence[str]) -> Profile:
        if self.recipe.device_profile is not None:
            return read_profile(self.recipe.device_profile, self.dense.anatomy, quants)
        found = take_profile(
            self.dense.folder, self.dense.anatomy, quants, align=self.cut.align,
            attention_goes=self.cut.limits.attention_goes, threads=self.recipe.threads, device=self.recipe.device,
        )  # fmt: skip
        if self.recipe.budget.tps is None:
            return found  # ratios hold at any speed
        return at_present(found, self.dense.folder, self.dense.anatomy)

    def _rounding(self, quant: str) -> float:
        """Nats a token that rounding the dense model adds, on calibration-side text that is set aside; at least 0."""

        def measure() -> dict[str, float]:
            say(f"what {quant} loses by itself")
            proof = self.artifacts.rounding_proof(quant)
            nats = math.log(proof.perplexity_artifact / proof.perplexity_torch)
            return {"nats": max(0.0, nats), "kld_mean": proof.kld_mean, "tokens": proof.tokens}

        text = sha256_file(self.cut.windows_path)
        found = self.stages.step(f"rounding.{quant}", [self.dense.key, self._key(), text], [], measure)
        return float(found["value"]["nats"])


def worth_trying(sizes: dict[str, float]) -> list[str]:
    """Types by falling bits, without those whose files save less than SMALLER over one that is kept before them."""
    kept: list[str] = []
    for quant in sorted(sizes, key=bits_of, reverse=True):
        if not kept or sizes[quant] <= (1 - SMALLER) * sizes[kept[-1]]:
            kept.append(quant)
    return kept
