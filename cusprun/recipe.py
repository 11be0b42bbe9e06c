"""The whole wish as one validated object: what a command line says, what YAML keeps, what a build reads.

Every flag of ``cusprun-edge build`` is a field here under the same name (dashes as underscores), and the other way
round. Values that cannot be are refused together, in one message with the legal values.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cusprun.budget import Budget, parse_bytes
from cusprun.errors import InvalidRequest
from cusprun.files import written_whole
from cusprun.formats import Rounding, resolve
from cusprun.quants import TYPES, parse_override

DEFAULT_RATIO = 0.25
DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_TOKENS = 49152
WINDOW = 512
ROUNDING_STRIDE = 4  # of the calibration windows every fourth gives the importance matrix, and what GPTQ rounds by

Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "iq3_m",
    "iq2_m", "auto", "fp32", "fp16", "int8", "int4",
]  # fmt: skip
Method = Literal[
    "refit", "cus-prun", "llm-pruner", "llm-pruner-vector", "llm-pruner-element2", "llm-pruner-mix",
    "flap", "wanda-sp", "slicegpt", "shortgpt", "magnitude", "random",
]  # fmt: skip
BUDGET = ("size", "ram", "speedup", "tps")
# Types that a budget is solved in where none is named; of those of one size the first is tried.
SOLVED_IN = {"gguf": ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_nl", "q4_0"), "onnx": ("int8", "int4")}
ONE_CORPUS = ("refit", "llm-pruner", "llm-pruner-vector", "llm-pruner-element2", "llm-pruner-mix", "flap", "wanda-sp")
WHOLE_MODEL = ("slicegpt", "shortgpt")  # methods that score no neurons: no ε, no combination, no choice of widths


class Recipe(BaseModel):
    """What to build. ``out`` says where; a recipe.yaml inside an expert leaves it out, its folder is the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    model: str = Field(DEFAULT_MODEL, min_length=1, description="dense model: default name, folder, .gguf or hub id")
    revision: str | None = Field(None, description="commit or tag of a hub model")
    lang: str | None = Field(None, description="language of the scenario")
    domain: str | None = Field(None, description="domain of the scenario")
    task: str | None = Field(None, description="task of the scenario")
    corpus: tuple[str, ...] = Field((), description="the user's own text, FILE[:weight]")
    dim: tuple[str, ...] = Field((), description="a further dimension, NAME=FILE")
    include: tuple[str, ...] = Field((), description="catalog entries to use that are not used by themselves")
    general: float = Field(0.125, ge=0, lt=1, description="share of the calibration tokens that is general text")
    weight: tuple[str, ...] = Field((), description="a dimension's weight in the rest of the text, NAME=NUMBER")
    method: Method = Field("refit", description="how neurons are chosen and repaired")
    combine: Literal["intersection", "mixture", "max"] | None = Field(
        None, description="how dimensions combine; refit, llm-pruner, flap and wanda-sp mix them, the others intersect"
    )
    widths: Literal["measured", "scores", "even"] | None = Field(
        None, description="where refit cuts: by measured loss, by Cus-Prun's scores, or the same share everywhere"
    )
    form: Literal["joint", "sequential", "parallel"] = Field(
        "joint",
        description="refit on the compacted prefix, where gate_proj and up_proj move too, or what reads the removed "
        "neurons alone; or each layer for itself",
    )
    vocab: str = Field("auto", pattern=r"^(keep|auto|[1-9][0-9]*)$", description="tokens that stay")
    ratio: float | None = Field(None, gt=0, lt=1, description="share of all parameters that goes")
    epsilon: float | None = Field(None, gt=0, lt=1, description="remove what changes a layer by no more than this")
    size: str | None = Field(None, description="instead: the file may have so many bytes, such as 60MB")
    ram: str | None = Field(None, description="peak memory of the process that runs it, such as 300MB")
    speedup: float | None = Field(None, gt=0, description="decode over the dense model's in the same type")
    tps: float | None = Field(None, gt=0, description="decoded tokens per second")
    device_profile: Path | None = Field(None, description="what bench --profile wrote on the device to solve for")
    layout: Literal["auto", "per-layer", "uniform"] = Field(
        "auto", description="widths by layer, or one for all; auto: by layer where the export holds it"
    )
    align: int | None = Field(None, ge=1, le=1024, description="FFN widths are multiples of this")
    tokens: int = Field(DEFAULT_TOKENS, ge=1024, description="calibration tokens, shared by the dimensions")
    window: int = Field(WINDOW, ge=16, description="tokens of one calibration window")
    recover: Literal["lora", "distill"] | None = Field(None, description="training after the cut")
    recover_rank: int = Field(8, ge=1, le=256, description="rank of the adapters")
    recover_tokens: int = Field(65536, ge=1024, description="calibration tokens that recovery reads in all")
    recover_steps: int | None = Field(None, ge=1, description="updates of recovery; default: one for each window")
    recover_rate: float = Field(1e-3, gt=0, lt=1, description="learning rate of recovery; larger models want less")
    format: tuple[Literal["gguf", "onnx"], ...] = Field((), description="formats to write; default: those of quant")
    quant: tuple[Quant, ...] = Field(("q8_0",), min_length=1, description="types to write, of GGUF and of ONNX")
    rounding: Rounding = Field(
        "auto",
        description="how weights are rounded: to the nearest, weighed by their inputs (imatrix), or with compensation "
        "(gptq); auto: gptq in four bits, imatrix below eight",
    )
    tensor_type: tuple[str, ...] = Field((), description="REGEX=TYPE of single tensors in the .gguf")
    block_size: Literal[32, 128] = Field(32, description="weights that share a scale in ONNX int4")
    zero_points: bool = Field(False, description="they share a fitted zero point too")
    output_bits: Literal[4, 8] = Field(8, description="bits of the output layer in ONNX int4")
    measure: bool = Field(True, description="measure dense and expert after the export")
    against_quantization: bool = Field(False, description="compare with the dense model in every type too")
    eval_tokens: int = Field(6144, ge=1024, description="tokens of each evaluation text")
    questions: int = Field(64, ge=1, description="most questions to ask")
    repetitions: int = Field(5, ge=2, description="speed runs of each artifact")
    seed: int = Field(0, ge=0, description="seed of the sampling of text")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where statistics are taken and artifacts measured")
    threads: int | None = Field(None, ge=1, description="threads of measurements; default: physical cores")
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the expert")
    out: Path | None = Field(None, description="folder of the expert")

    @model_validator(mode="before")
    @classmethod
    def _resolve_types(cls, values: Any) -> Any:
        """Types joined by commas come apart; a format without a type gets its default."""
        if not isinstance(values, dict):
            return values
        if not values.get("quant") and any(values.get(name) is not None for name in BUDGET):
            formats = values.get("format") or ()
            named = ",".join([formats] if isinstance(formats, str) else map(str, formats)) or "gguf"
            values = {**values, "quant": tuple(q for name in named.split(",") for q in SOLVED_IN.get(name, ()))}
        if not {"format", "quant"} & values.keys():
            return values
        given = {key: values.get(key) or () for key in ("format", "quant")}
        lists = {key: [value] if isinstance(value, str) else value for key, value in given.items()}
        if not all(isinstance(value, list | tuple) for value in lists.values()):
            return values  # the fields say what is wrong
        if not all(isinstance(part, str) for value in lists.values() for part in value):
            return values
        apart = {key: [part for one in value for part in one.split(",") if part] for key, value in lists.items()}
        try:
            return {**values, "format": apart["format"], "quant": resolve(apart["format"], apart["quant"])}
        except InvalidRequest:  # said below, with everything else that is wrong
            return {**values, "format": apart["format"], "quant": apart["quant"] or ["q8_0"]}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        if self.ratio is not None and self.epsilon is not None:
            problems.append("ratio and epsilon are two ways to say how much goes: give one")
        if not (self.lang or self.domain or self.task or self.corpus or self.dim):
            problems.append("a scenario needs at least one of lang, domain, task, corpus, dim")
        problems += self._wrong_budget()
        if self.tokens < 4 * self.window:
            problems.append(f"tokens {self.tokens} is less than four windows of {self.window}")
        if self.epsilon is not None and self.method not in ("refit", "cus-prun"):
            problems.append(f"epsilon is Cus-Prun's: with method {self.method} give ratio")
        if self.method != "refit" and self.widths is not None:
            problems.append(f"widths is for refit alone; {self.method} cuts where its paper does")
        if self.epsilon is not None and self.widths not in (None, "scores"):
            problems.append(f"epsilon decides the widths: widths {self.widths} cannot")
        problems += _wrong_weights(self.weight)
        for value in self.tensor_type:
            try:
                parse_override(value)
            except InvalidRequest as error:
                problems.append(str(error))
        try:
            resolve(self.format, self.quant)
        except InvalidRequest as error:
            problems.append(str(error))
        needing = [quant for quant in self.quant if quant in TYPES and TYPES[quant].needs_imatrix]
        if needing and self.rounding == "nearest":
            problems.append(f"quant {needing[0]} needs an importance matrix: rounding nearest cannot give it")
        if self.rounding == "gptq" and self.zero_points:
            problems.append("rounding gptq is written for symmetric blocks: leave zero_points out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong_budget(self) -> list[str]:
        problems = []
        for name in ("size", "ram"):
            if (value := getattr(self, name)) is not None:
                try:
                    parse_bytes(value)
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        given = [name for name in BUDGET if getattr(self, name) is not None]
        other = [name for name in ("ratio", "epsilon") if getattr(self, name) is not None]
        if given and other:
            problems.append(f"{given[0]} and {other[0]} are two ways to say how much goes: give one")
        if given and (self.method != "refit" or self.cuts_by != "measured"):
            problems.append(f"{given[0]} is solved by measured losses: leave method and widths out, or give ratio")
        if self.device_profile is not None and not {"ram", "speedup", "tps"} & set(given):
            problems.append("device_profile says how fast and large models run: give tps, speedup or ram")
        untimed = [quant for quant in self.quant if quant in TYPES and TYPES[quant].needs_imatrix]
        if untimed and given:
            problems.append(f"quant {untimed[0]} cannot be solved for: name another")
        return problems

    @property
    def budget(self) -> Budget:
        """What the device allows; empty where ratio or ε decides."""
        size, ram = (None if text is None else parse_bytes(text) for text in (self.size, self.ram))
        return Budget(size, ram, self.speedup, self.tps)

    @property
    def removed_share(self) -> float | None:
        """The ratio asked for; None where ε or the device decides."""
        if self.epsilon is not None or self.budget:
            return None
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the dimensions that were given one."""
        return {name: float(number) for name, _, number in (text.partition("=") for text in self.weight)}

    @property
    def combined(self) -> Literal["intersection", "mixture", "max"]:
        """How the dimensions combine; methods whose papers score one corpus get one, unless told otherwise."""
        return self.combine or ("mixture" if self.method in ONE_CORPUS else "intersection")

    @property
    def cuts_by(self) -> Literal["measured", "scores", "even"]:
        """Where refit cuts."""
        return self.widths or ("measured" if self.epsilon is None else "scores")

    def key(self, *fields: str) -> str:
        """Hex sha256 over the named fields, for the content hashes of stages."""
        values = self.model_dump(mode="json", include=set(fields))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML without ``out``."""
        text: str = yaml.safe_dump(self.model_dump(mode="json", exclude={"out"}), sort_keys=False, allow_unicode=True)
        return text

    def save(self, path: Path) -> None:
        """Writes YAML, whole or not at all."""
        with written_whole(path) as part:
            part.write_text(self.to_yaml(), encoding="utf-8")


def _wrong_weights(weights: tuple[str, ...]) -> list[str]:
    """One line for each weight that is not NAME=NUMBER with a number above 0."""
    problems = []
    for text in weights:
        name, _, number = text.partition("=")
        if not name or not re.fullmatch(r"[0-9]*\.?[0-9]+", number) or not float(number) > 0:
            problems.append(f"weight {text!r}: write NAME=NUMBER with a number above 0, such as domain=2")
    return problems


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe of these values. Raises one InvalidRequest that lists every unknown key and impossible value."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise InvalidRequest.together(_explain(error)) from None


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file; ``overrides`` replace its values.

    Raises InvalidRequest where the file is missing, no YAML mapping, or holds what :func:`make_recipe` refuses.
    """
    if not path.is_file():
        raise InvalidRequest(f"--recipe {path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(
            f"--recipe {path} must hold `field: value` lines; fields: {', '.join(Recipe.model_fields)}"
        )
    return make_recipe({**{str(key): value for key, value in values.items()}, **(overrides or {})})


def _explain(error: ValidationError) -> list[str]:
    """One line for each fault: the field, what was given, what is legal."""
    lines = []
    faults = error.errors()
    inside = {fault["loc"][0] for fault in faults if len(fault["loc"]) > 1}
    for fault in faults:
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if fault["type"] == "too_short" and name in inside:
            continue  # the list is short because its items were refused
        given, context = fault["input"], fault.get("ctx", {})
        if fault["type"] == "extra_forbidden":
            lines.append(f"{name}: no such field; fields: {', '.join(Recipe.model_fields)}")
        elif fault["type"] == "literal_error":
            lines.append(f"{name}: {given!r} is not one of {context['expected'].replace(' or ', ', ')}")
        elif fault["type"] == "value_error":
            lines.append(str(context["error"]))
        else:
            lines.append(f"{name}: {given!r} cannot be: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return lines
