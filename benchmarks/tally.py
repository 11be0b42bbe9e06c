"""The figures of one artifact on one text, the sums that they come from, and how two artifacts' figures compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from cusprun.errors import Failed, InvalidRequest

REMARK = (
    "the vocabularies differ: both are scored on the same bytes after the same bytes, each in tokens of its own; "
    "bits per byte compare them, perplexities per token do not"
)


@dataclass(frozen=True)
class Quality:
    """What `eval --json` prints.

    ``kld_mean`` (nats) and ``top1_agreement`` (share) only against another artifact of the same vocabulary.
    """

    perplexity: float
    perplexity_stderr: float  # perplexity x standard error of the mean negative log-likelihood
    bits_per_byte: float  # of the scored tokens, over the UTF-8 bytes they stand for
    tokens: int  # scored
    kld_mean: float | None  # mean of KL(against || artifact) over the scored positions
    top1_agreement: float | None
    context: int  # tokens of a window; where the vocabularies differ, those of the artifact it is held against


@dataclass(frozen=True)
class Divergence:
    """How KL(against || artifact) is spread over the scored positions, in nats, and how sure its mean and top-1 are."""

    kld_mean_stderr: float
    kld_p50: float
    kld_p90: float
    kld_p99: float
    kld_max: float
    top1_agreement_stderr: float


@dataclass(frozen=True)
class QualityPair:
    """One corpus measured on an artifact and, where one was given, on the artifact it is held against."""

    artifact: Quality
    against: Quality | None
    same_vocabulary: bool = True  # False: each scored in tokens of its own, over the same bytes
    divergence: Divergence | None = None  # where the vocabularies are the same
    nats: tuple[float, ...] = ()  # the artifact's losses, summed by window
    against_nats: tuple[float, ...] = ()  # and those of the other on the same bytes

    @classmethod
    def of(cls, value: Any) -> QualityPair:
        """What ``asdict`` made of a pair, from JSON too."""
        return TypeAdapter(cls).validate_python(value)

    @property
    def ratios(self) -> dict[str, float | None]:
        """The artifact's figures over the other's; of perplexity None where a token is not the same in both."""
        if self.against is None:
            return {}
        one, other = self.artifact, self.against
        return {
            "perplexity": one.perplexity / other.perplexity if self.same_vocabulary else None,
            "bits_per_byte": one.bits_per_byte / other.bits_per_byte,
            "tokens": one.tokens / other.tokens,
        }

    @property
    def increase(self) -> float | None:
        """Of bits per byte over the other artifact's, as a share: 0.02 is 2 % more."""
        return None if self.against is None else self.artifact.bits_per_byte / self.against.bits_per_byte - 1

    @property
    def increase_stderr(self) -> float | None:
        """Standard error of the increase, paired by window; None of one window."""
        return None if self.against is None else ratio_stderr(self.nats, self.against_nats)

    def as_json(self) -> dict[str, Any]:
        """The artifact's figures; with another one also that one's, the increase, and what must not be compared."""
        found = asdict(self.artifact) | ({} if self.divergence is None else asdict(self.divergence))
        if self.against is not None:
            found |= {"against": asdict(self.against), "bits_per_byte_increase": self.increase}
            found |= {"bits_per_byte_increase_stderr": self.increase_stderr}
            found |= {"same_vocabulary": self.same_vocabulary} | ({} if self.same_vocabulary else {"remark": REMARK})
        return found

    def as_lines(self) -> list[str]:
        """The same for a terminal, a figure a line."""
        shown = asdict(self.artifact) | ({} if self.divergence is None else asdict(self.divergence))
        lines = [_line(key, value) for key, value in shown.items() if value is not None]
        if self.against is not None and self.increase is not None:
            for key in ("perplexity", "bits_per_byte", "tokens"):
                lines.append(_line(f"against {key}", getattr(self.against, key)))
            lines.append(_line("over against", f"{percent(self.increase, self.increase_stderr)} bits per byte"))
        return lines if self.same_vocabulary else [*lines, REMARK]


@dataclass
class Tally:
    """Running sums over scored positions, in nats and bytes."""

    count: int = 0
    nll: float = 0.0
    nll_squared: float = 0.0
    bytes: int = 0
    kld: list[np.ndarray] = field(default_factory=list)  # by position: its percentiles need all of them
    same_top: int = 0
    windows: list[float] = field(default_factory=list)  # nats of each

    def add(self, nll: np.ndarray, n_bytes: int) -> None:
        """Adds the losses of one window's scored positions, and the bytes that they stand for."""
        self.windows.append(float(nll.sum()))
        self.count += len(nll)
        self.nll += float(nll.sum())
        self.nll_squared += float((nll * nll).sum())
        self.bytes += n_bytes

    def quality(self, context: int, compared: bool) -> Quality:
        mean = self.nll / self.count
        variance = max(self.nll_squared / self.count - mean * mean, 0.0)
        if mean > 700:  # exp overflows; a working model is far below the log of its vocabulary
            raise Failed(f"the mean loss is {mean:.0f} nats per token: the artifact is broken")
        if self.bytes == 0:
            raise InvalidRequest("the scored tokens are control tokens only: give a text")
        perplexity = math.exp(mean)
        return Quality(
            perplexity=perplexity,
            perplexity_stderr=perplexity * math.sqrt(variance / (self.count - 1)) if self.count > 1 else 0.0,
            bits_per_byte=self.nll / math.log(2) / self.bytes,
            tokens=self.count,
            kld_mean=float(np.concatenate(self.kld).mean()) if compared else None,
            top1_agreement=self.same_top / self.count if compared else None,
            context=context,
        )

    def divergence(self) -> Divergence:
        """Of a tally that has KL by position."""
        kld, share = np.concatenate(self.kld), self.same_top / self.count
        p50, p90, p99 = np.percentile(kld, [50, 90, 99])
        others = max(self.count - 1, 1)
        return Divergence(
            kld_mean_stderr=float(kld.std()) / math.sqrt(others),
            kld_p50=float(p50),
            kld_p90=float(p90),
            kld_p99=float(p99),
            kld_max=float(kld.max()),
            top1_agreement_stderr=math.sqrt(share * (1 - share) / others),
        )


def ratio_stderr(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Standard error of Σ one / Σ other over paired windows; None of fewer than two.

    Windows are what was drawn; the tokens of one hang together. The variance of a ratio estimator, linearized: Cochran,
    Sampling Techniques (1977), 6.4.
    """
    n = len(one)
    if n < 2:
        return None
    ratio = sum(one) / sum(other)
    residuals = [a - ratio * b for a, b in zip(one, other, strict=True)]
    return math.sqrt(n / (n - 1) * sum(each * each for each in residuals)) / sum(other)


def percent(share: float | None, stderr: float | None = None) -> str:
    """0.0213 as +2.1 %, with two digits below 1 %; with a standard error +2.1 ± 0.4 %; None as nothing."""
    if share is None:
        return ""
    digits = 1 if abs(share) >= 0.00995 else 2
    spread = "" if stderr is None else f" ± {100 * stderr:.{digits}f}"
    return f"{100 * share:+.{digits}f}{spread} %"


def _line(key: str, value: Any) -> str:
    return f"{key:<22} {value:.4f}" if isinstance(value, float) else f"{key:<22} {value}"
