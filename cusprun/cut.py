"""The cut of a build: from text to the compacted model folder, by the recipe's method, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.allocation import plan_epsilon
from cusprun.anatomy import Anatomy, LayerWidths, describe
from cusprun.checkpoint import Weights, load_tokenizer
from cusprun.compact import compact
from cusprun.corpora.selection import Selection, read_windows
from cusprun.dense import Dense
from cusprun.errors import InvalidRequest
from cusprun.files import copy_folder
from cusprun.methods import bias_compensation, plan_method, score_layers
from cusprun.plan import Plan
from cusprun.preflight import Prepared
from cusprun.progress import say
from cusprun.recipe import BUDGET, WHOLE_MODEL
from cusprun.stages import Stages
from cusprun.statistics import load_statistics, save_statistics, stream

if TYPE_CHECKING:
    from cusprun.sensitivity import LayerSensitivity
    from cusprun.solver import Device, Solved
    from cusprun.widths import Widths

WIDTHS_STRIDE = 4  # with refit, every fourth window gives the widths
GRADIENT_WINDOWS = 8  # of each dimension that gradients are taken of
# Whose allocation gives refit its widths where no losses are measured; magnitude's is the same share everywhere.
WIDTHS_OF = {"scores": "cus-prun", "even": "magnitude"}


@dataclass(frozen=True)
class Base:
    """The model that is cut: the dense one, or the dense one with fewer tokens."""

    folder: Path
    anatomy: Anatomy
    windows: Path
    key: str  # of the text and the model


class Cut:
    """The stages between the text and the model folder."""

    def __init__(self, prepared: Prepared, dense: Dense, stages: Stages, align: int) -> None:
        self.prepared, self.dense, self.stages, self.align = prepared, dense, stages, align
        self.recipe, self.limits = prepared.recipe, prepared.limits
        self.windows_path, self.texts_path = stages.folder / "windows.safetensors", stages.folder / "texts.jsonl"
        self.text: dict[str, Any] = {}
        self.base: Base | None = None
        self.plan: Plan | None = None  # None where the method keeps no neurons of its own (slicegpt)
        self.predicted: float | None = None
        self.device: Device | None = None  # what a budget is solved by
        self.solved: dict[str, Any] | None = None  # type and expected figures, where a budget was given
        self.recovery: dict[str, Any] | None = None

    def run(self) -> str:
        """Leaves the model folder; returns the key of what it was made of."""
        text = self._select("text", self.dense.folder, self.dense.key, self.windows_path, self.texts_path)
        self.text = text["value"]
        base = Base(self.dense.folder, self.dense.anatomy, self.windows_path, f"{text['key']}/{self.dense.key}")
        measured = self.recipe.method == "refit" and self.recipe.cuts_by == "measured"
        sensitivity = self._sensitivity(base) if measured else None
        prices = self._prices(text["key"]) if self.recipe.vocab != "keep" else None
        chosen = self._spend(base, sensitivity, prices)
        widths = chosen["value"]["widths"] if measured else None
        self.predicted, self.solved = chosen["value"].get("predicted"), chosen["value"].get("solved")
        if self.solved is not None:
            from cusprun.solver import as_words

            say(f"solved: {self.solved['quant']}, {as_words(self.solved)}")
        if prices is not None and chosen["value"]["rows"] < self.dense.anatomy.vocab_size:
            base = self._trim(prices, chosen)
        self.base = base
        planned = self._plan(base, chosen["key"], widths)
        return self._compact(base, planned)

    # text and vocabulary ---------------------------------------------------------------------------------------------

    @cached_property
    def selection(self) -> Selection:
        prepared = self.prepared
        return Selection.of(self.recipe, prepared.scenario, prepared.own, prepared.dims)

    def _select(self, name: str, folder: Path, key: str, windows: Path, texts: Path) -> dict[str, Any]:
        """Calibration windows by dimension and the held-out texts, for the tokenizer of ``folder``."""
        return self.stages.step(
            name,
            [self.selection.key(), key],
            [windows, texts],
            lambda: self.selection.write(load_tokenizer(folder), windows, texts),
        )

    @property
    def prices_path(self) -> Path:
        return self.stages.folder / "prices.safetensors"

    def _prices(self, text_key: str) -> dict[str, Any]:
        """What each token's absence costs on the scenario's calibration text."""

        def price() -> dict[str, Any]:
            from cusprun.rows import price_weights
            from cusprun.vocabulary import price_vocabulary

            tokenizer = load_tokenizer(self.dense.folder)
            text = self.selection.rendered(tokenizer)
            weights = price_weights(self.selection.shares(list(text.by_dimension)))
            found = price_vocabulary(
                self.dense.folder, text.by_dimension, weights,
                own=text.own, originals=text.originals, seed=self.recipe.seed, device=self.recipe.device,
            )  # fmt: skip
            found.save(self.prices_path)
            return found.note

        return self.stages.step("prices", [text_key, self.dense.key, self.recipe.device], [self.prices_path], price)

    def _trim(self, prices: dict[str, Any], chosen: dict[str, Any]) -> Base:
        """The dense model with the chosen tokens alone, and the text cut into windows of these."""
        folder = self.stages.folder / "trimmed"

        def trim() -> None:
            from cusprun.vocabulary import load_prices, trim_model

            trim_model(self.dense.folder, load_prices(self.prices_path).rows_for(chosen["value"]["rows"]), folder)

        trimmed = self.stages.step("trim", [prices["key"], str(chosen["value"]["rows"])], [folder], trim)
        windows = self.stages.folder / "windows-trimmed.safetensors"
        texts = self.stages.folder / "texts-trimmed.jsonl"
        text = self._select("retext", folder, trimmed["key"], windows, texts)
        return Base(folder, describe(folder), windows, f"{text['key']}/{trimmed['key']}")

    # where to cut ----------------------------------------------------------------------------------------------------

    def _sensitivity(self, base: Base) -> dict[str, Any]:
        from cusprun.sensitivity import DEEP

        deep = self.recipe.removed_share is None or self.recipe.removed_share > DEEP

        def take() -> list[dict[str, Any]]:
            from cusprun.sensitivity import measure, probe_windows

            windows = read_windows(base.windows)
            strided = {name: ids[::WIDTHS_STRIDE] for name, ids in windows.items()}
            found = measure(
                base.folder, base.anatomy, strided, probe_windows(windows), deep=deep, device=self.recipe.device
            )
            return [layer.to_json() for layer in found]

        return self.stages.step("sensitivity", [base.key, self.recipe.device, str(deep)], [], take)

    def _spend(self, base: Base, sensitivity: dict[str, Any] | None, prices: dict[str, Any] | None) -> dict[str, Any]:
        """Rows that stay, and with measured losses the widths of every layer."""

        def spend() -> dict[str, Any]:
            from cusprun.sensitivity import LayerSensitivity
            from cusprun.widths import solve_widths

            rows = self._row_choices()
            if sensitivity is None:
                return {"rows": rows[0].rows}
            layers = [
                LayerSensitivity.from_json(layer).within(
                    attention_goes=self.limits.attention_goes, layers_go=self.limits.layers_go
                )
                for layer in sensitivity["value"]
            ]
            settings: dict[str, Any] = {
                "align": self.align, "uniform": self.limits.layout == "uniform", "rows": rows,
            }  # fmt: skip
            solved = None
            if self.recipe.budget:
                best = self._solve(base, layers, settings)
                found, solved = best.widths, {"quant": best.quant, "rounding": best.rounding, **best.expected}
            else:
                assert self.recipe.removed_share is not None
                target = self.recipe.removed_share * base.anatomy.parameters
                found = solve_widths(base.anatomy, layers, target, **settings)
            widths = [None if layer is None else [layer.ffn, layer.heads, layer.kv_heads] for layer in found.layers]
            kept = found.rows if found.rows is not None else base.anatomy.vocab_size
            say(f"the plan adds {found.predicted:.3f} nats per token in sum of what was measured layer by layer")
            value = {"rows": kept, "widths": widths, "predicted": found.predicted}
            return value if solved is None else {**value, "solved": solved}

        keys = [step["key"] for step in (sensitivity, prices) if step is not None]
        fields = self.recipe.key("ratio", "vocab", "method", "widths", "epsilon")
        if self.recipe.budget:
            assert self.device is not None
            keys += [self.recipe.key(*BUDGET), self.device.key()]
        return self.stages.step("spend", [base.key, *keys, fields, self.limits.key(), str(self.align)], [], spend)

    def _solve(self, base: Base, layers: Sequence[LayerSensitivity], settings: dict[str, Any]) -> Solved:
        """The type, widths and rows that lose least within the recipe's budget."""
        from cusprun.solver import solve_budget
        from cusprun.vocabulary import load_prices

        device = self.device
        assert device is not None
        prices = load_prices(self.prices_path) if self.recipe.vocab != "keep" else None

        def measure_bytes(quant: str, widths: Widths) -> int:
            kept = None
            if prices is not None and widths.rows is not None and widths.rows < base.anatomy.vocab_size:
                kept = prices.rows_for(widths.rows)
            return device.file_bytes(quant, widths.layers, kept)

        return solve_budget(
            base.anatomy, layers, self.recipe.budget, device.offers(), measure_bytes=measure_bytes, **settings
        )

    def _row_choices(self) -> list[Any]:
        """Sizes of the vocabulary that may be chosen, with what they cost in nats per token."""
        from cusprun.rows import row_choices
        from cusprun.widths import RowsChoice

        recipe = self.recipe
        if recipe.vocab == "keep":
            return [RowsChoice(self.dense.anatomy.vocab_size, 0.0)]
        from cusprun.vocabulary import load_prices

        weighed = recipe.method == "refit" and recipe.cuts_by == "measured"
        wanted = None if recipe.vocab == "auto" else int(recipe.vocab)
        return row_choices(load_prices(self.prices_path), self.dense.anatomy, recipe.removed_share, wanted, weighed)

    # what stays ------------------------------------------------------------------------------------------------------

    @property
    def refitted_path(self) -> Path:
        return self.stages.folder / "refitted"

    def _remaining_ratio(self, base: Base) -> float:
        """Share of the base's parameters that is still to go when the dense model is to lose the recipe's share."""
        assert self.recipe.removed_share is not None
        dense, now = self.dense.anatomy.parameters, base.anatomy.parameters
        left = now - (1 - self.recipe.removed_share) * dense
        if left <= 0:
            raise InvalidRequest(
                f"--vocab leaves {base.anatomy.vocab_size:,} tokens, which alone removes {1 - now / dense:.1%} of all "
                f"parameters, more than --ratio {self.recipe.removed_share:g}: write a larger number or --vocab keep"
            )
        return left / now

    def _plan(self, base: Base, key: str, widths: list[list[int] | None] | None) -> dict[str, Any]:
        """What every layer keeps; with refit, flap and slicegpt the new matrices too."""
        recipe = self.recipe
        if recipe.method in WHOLE_MODEL:
            return self._plan_whole(base, key)
        if widths is not None:
            return self._refit(base, key, [None if layer is None else LayerWidths(*layer) for layer in widths])
        planned = self._plan_scored(base, key)
        if recipe.method == "refit":
            plan = Plan.from_json(planned["value"], base.anatomy)
            return self._refit(base, planned["key"], plan.widths)
        return planned

    def _refit(self, base: Base, key: str, widths: Sequence[LayerWidths | None]) -> dict[str, Any]:
        def repair() -> dict[str, Any]:
            from cusprun.refit import refit

            plan = refit(
                base.folder, base.anatomy, widths, read_windows(base.windows), self.refitted_path,
                form=self.recipe.form, combine=self.recipe.combined, device=self.recipe.device,
            )  # fmt: skip
            return plan.to_json()

        fields = self.recipe.key("form", "combine", "device")
        return self.stages.step("refit", [base.key, key, fields], [self.refitted_path], repair)

    def _plan_scored(self, base: Base, key: str) -> dict[str, Any]:
        """The plan by the scores of a criterion; flap's biases are written beside it."""
        from cusprun.importance import find_criterion

        recipe = self.recipe
        criterion = find_criterion(WIDTHS_OF[recipe.cuts_by] if recipe.method == "refit" else recipe.method)
        stride = WIDTHS_STRIDE if recipe.method == "refit" else 1
        combine = recipe.combined if recipe.method != "refit" else recipe.combine or "intersection"
        statistics_path = self.stages.folder / "statistics"

        def take() -> None:
            windows = {name: ids[::stride] for name, ids in read_windows(base.windows).items()}
            found = stream(
                base.folder, base.anatomy, windows, needs=criterion.needs,
                gradient_windows=GRADIENT_WINDOWS, device=recipe.device,
            )  # fmt: skip
            save_statistics(found, statistics_path)

        def plan() -> dict[str, Any]:
            seen = load_statistics(statistics_path)
            weights = Weights(base.folder)
            tokens = {name: float(ids.size) for name, ids in read_windows(base.windows).items()}
            scores = score_layers(weights, base.anatomy, seen, criterion, combine, tokens)
            if recipe.epsilon is not None:
                plan = plan_epsilon(base.anatomy, scores, recipe.epsilon, align=self.align, layout=self.limits.layout)
            else:
                plan = plan_method(
                    criterion, base.anatomy, scores, self._remaining_ratio(base),
                    align=self.align, layout=self.limits.layout,
                )  # fmt: skip
            if criterion.compensates and recipe.method != "refit":
                plan = bias_compensation(base.folder, plan, seen, self.refitted_path, tokens)
            return plan.to_json()

        needs = [*sorted(criterion.needs), str(stride)]
        seen = self.stages.step("statistics", [base.key, recipe.device, *needs], [statistics_path], take)
        weighed = "by tokens" if combine == "mixture" or criterion.compensates else ""
        fields = f"{recipe.key('ratio', 'epsilon')}{self.limits.key()}/{combine} {weighed}"
        outputs = [self.refitted_path] if criterion.compensates else []
        return self.stages.step("plan", [seen["key"], key, fields, criterion.name, str(self.align)], outputs, plan)

    def _plan_whole(self, base: Base, key: str) -> dict[str, Any]:
        """ShortGPT's layers, or SliceGPT's model."""
        recipe, windows, ratio = self.recipe, read_windows(base.windows), self._remaining_ratio(base)

        def drop() -> dict[str, Any]:
            from cusprun.importance.shortgpt import shortgpt_plan

            return shortgpt_plan(base.folder, base.anatomy, windows, ratio, recipe.device).to_json()

        def rotate() -> None:
            from cusprun.importance.slicegpt import slicegpt

            slicegpt(base.folder, base.anatomy, windows, ratio, self.refitted_path, recipe.device, note=self.note)

        inputs = [base.key, key, recipe.key("ratio", "device", "method")]
        if recipe.method == "shortgpt":
            return self.stages.step("plan", inputs, [], drop)
        return self.stages.step("plan", inputs, [self.refitted_path], rotate)

    # the model -------------------------------------------------------------------------------------------------------

    @property
    def note(self) -> dict[str, str]:
        """What the model's config.json says of where it comes from."""
        return {"base": self.dense.id, "method": self.recipe.method, "scenario": str(self.prepared.scenario)}

    def _compact(self, base: Base, planned: dict[str, Any]) -> str:
        """Writes the model folder, through recovery where the recipe asks for it."""
        recipe, out = self.recipe, self.stages.out / "model"
        target = self.stages.folder / "compacted" if recipe.recover else out
        refitted = self.refitted_path if recipe.method in ("refit", "flap") else None
        if recipe.method != "slicegpt":
            self.plan = Plan.from_json(planned["value"], base.anatomy)

        def write() -> None:
            if self.plan is None:
                copy_folder(self.refitted_path, target)
                return
            removed = 1 - self.plan.expert.parameters / self.dense.anatomy.parameters
            say(
                f"removes {removed:.1%} of {self.dense.anatomy.parameters / 1e6:.1f} M parameters; "
                f"{self.plan.expert.parameters / 1e6:.1f} M stay"
            )
            compact(base.folder, self.plan, target, refitted=refitted, note=self.note)

        name = "compacted" if recipe.recover else "model"
        written = self.stages.step(name, [planned["key"], base.key], [target], write)
        if not recipe.recover:
            key: str = written["key"]
            return key
        recovered = self._recover(base, written["key"], target, out)
        self.recovery, key = recovered["value"], recovered["key"]
        return key

    def _recover(self, base: Base, key: str, compacted: Path, out: Path) -> dict[str, Any]:
        def train() -> dict[str, Any]:
            from cusprun.recover import estimate, recover

            windows, kind = read_windows(base.windows), recipe.recover
            assert kind is not None
            teacher = base.folder if kind == "distill" else None
            course: dict[str, Any] = {
                "kind": kind, "teacher": teacher, "rank": recipe.recover_rank, "steps": recipe.recover_steps,
                "tokens": recipe.recover_tokens, "device": recipe.device,
            }  # fmt: skip
            say(f"recovery by {kind}: about {estimate(compacted, windows, **course) / 60:.1f} minutes")
            report = recover(
                compacted, windows, out, **course, learning_rate=recipe.recover_rate, seed=recipe.seed,
                state=self.stages.folder / "recovery",
            )  # fmt: skip
            return report.as_json()

        recipe = self.recipe
        fields = recipe.key(
            "recover", "recover_rank", "recover_tokens", "recover_steps", "recover_rate", "seed", "device"
        )  # fmt: skip
        return self.stages.step("model", [key, base.key, fields], [out], train)
