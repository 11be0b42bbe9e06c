"""What the page needs of report.json and expert.json, so that a damaged file is told by its place.

Anything further may stand in them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
Number = float  # whole ones too, strings and booleans not
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Spread(Part):
    mean: Number
    sd: Number
    n: Count


class Samples(Part):
    decode_tps: list[Number] = []
    prefill_tps: list[Number] = []


class Speed(Part):
    artifact: str
    format: str
    quant: str
    runtime: str
    threads: Count
    prefill_tokens: Count
    decode_tokens: Count
    prefill_tps: Spread
    decode_tps: Spread
    ttft_ms: Number
    load_s: Number
    peak_rss_bytes: Count
    file_bytes: Annotated[int, Field(gt=0, lt=2**63)]
    parameters: Count
    macs_per_token: Count
    samples: Samples = Samples()


class Pairs(Part):
    median_of_pairs: Number
    of_pairs: Number | None = None  # this and what follows are missing in old records
    pairs: Count | None = None
    ci95: Interval | None = None


class Exact(Part):
    exact: Number


class Ratios(Part):
    prefill_tps: Pairs
    decode_tps: Pairs
    ttft_ms: Pairs
    load_s: Pairs
    peak_rss_bytes: Pairs
    file_bytes: Exact
    parameters: Exact
    macs_per_token: Exact
    decode_yield: Pairs
    prefill_yield: Pairs


class SpeedSection(Part):
    how: str
    expert: Speed
    dense: Speed
    ratios: Ratios


class Quality(Part):
    perplexity: Positive
    perplexity_stderr: Number
    bits_per_byte: Positive
    tokens: Count
    kld_mean: Number | None
    top1_agreement: Number | None
    context: Count


class QualityRatios(Part):
    perplexity: Number | None
    bits_per_byte: Number
    tokens: Number


class Text(Part):
    expert: Quality
    dense: Quality | None = None
    bits_per_byte_increase: Number = 0.0
    bits_per_byte_increase_stderr: Number | None = None
    ratios: QualityRatios | None = None


class QualitySection(Part):
    how: str
    score: str
    corpora: dict[str, Text]


class Answers(Part):
    n: Annotated[int, Field(gt=0)]
    accuracy: Number
    accuracy_normalised: Number
    interval: Interval
    interval_normalised: Interval
    constant_answer_accuracy: Number
    chance: Number


class Paired(Part):
    p_value: Number


class Set(Part):
    expert: Answers
    dense: Answers
    paired: Paired
    paired_normalised: Paired


class Tasks(Part):
    how: str
    sets: dict[str, Set]


class Kind(Part):
    before: Count
    after: Count


class Layer(Part):
    layer: Count
    ffn: Kind
    heads: Kind
    kv_heads: Kind


class Environment(Part):
    cpu: str
    physical_cores: int | None
    threads: Count
    system: str
    versions: dict[str, Any]


class Sample(Part):
    prompt: str
    reference: str | None
    dense: str
    expert: str


class Compared(Part):
    name: str
    kind: Annotated[str, Field(pattern="^(expert|dense|given)$")]
    format: str
    quant: str
    file_bytes: Annotated[int, Field(gt=0, lt=2**63)]
    decode_tps: Spread | None
    peak_rss_bytes: int | None
    bits_per_byte: dict[str, Positive]
    dominated: bool
    remark: str
    increase: dict[str, Number] = {}  # none in old records
    increase_stderr: dict[str, Number | None] = {}
    samples: Samples = Samples()


class Frontier(Part):
    rows: list[Compared]
    text: str
    how: str = ""
    verdicts: list[str] = []


class Budget(Part):
    """The wishes that :class:`cusprun.budget.Budget` knows, and no other: it is made of them."""

    model_config = ConfigDict(extra="forbid")

    size: Count | None = None
    ram: Count | None = None
    speedup: Number | None = None
    tps: Number | None = None


class Method(Part):
    budget: Budget | None = None


class Solved(Part):
    figure: Literal["file_bytes", "peak_rss_bytes", "decode_tps", "speedup"]
    wish: Number | None
    predicted: Number
    measured: Number
    error: Number


class ReportFile(Part):
    cusprun: str
    measured_at: str
    scenario: dict[str, Any]
    method: Method
    environment: Environment
    speed: SpeedSection
    quality: QualitySection
    tasks: Tasks
    layers: list[Layer]
    corpora: list[dict[str, Any]]
    proofs: list[dict[str, Any]]
    stages: dict[str, Number]
    samples: list[Sample] = []
    samples_how: str = ""
    frontier: Frontier | None = None
    solved: list[Solved] | None = None


class Base(Part):
    id: str
    parameters: Count
    sha256: str | None = None
    licence: str | None = None


class Artifact(Part):
    path: str
    format: str
    quant: str
    bytes: Count
    sha256: str


class CardFile(Part):
    base: Base
    artifacts: list[Artifact]
