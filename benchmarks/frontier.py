"""The frontier: which artifacts are worth shipping, by quality against bytes, decode speed and memory.

Every artifact is held against one reference, over the same bytes of text, so that whatever their vocabularies and types
their bits per byte compare. What was measured of an artifact's quality is kept by its content and not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cusprun.benchmarks.answer_store import artifact_sha256
from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.dominance import MEMORY, MEMORY_TOLERANCE, SIZE, SPEED, Figures, advantage, dominates
from cusprun.benchmarks.kept_quality import evaluate_kept
from cusprun.benchmarks.speed import Spread, bench
from cusprun.benchmarks.tables import Grid
from cusprun.benchmarks.tally import percent
from cusprun.corpora.cache import cache_folder
from cusprun.errors import InvalidRequest
from cusprun.progress import say

Kind = Literal["expert", "dense", "given"]


@dataclass(frozen=True)
class Candidate:
    """An artifact to compare."""

    name: str
    path: Path
    kind: Kind


@dataclass(frozen=True)
class Point:
    """What was measured of one artifact."""

    name: str
    kind: Kind
    format: str
    quant: str
    file_bytes: int
    parameters: int
    bits_per_byte: dict[str, float]  # by text: the reference's, times one and the increase
    increase: dict[str, float]  # of bits per byte over the reference's on the same bytes
    decode_tps: Spread | None = None
    prefill_tps: Spread | None = None
    peak_rss_bytes: int | None = None
    increase_stderr: dict[str, float | None] = field(default_factory=dict)  # paired by window; None of one window
    samples: dict[str, list[float]] = field(default_factory=dict)  # decode_tps of every round; none in old records

    def figures(self, text: str) -> Figures:
        """What decides who dominates whom."""
        return Figures(
            size=self.file_bytes,
            loss=self.increase[text],
            speed=None if self.decode_tps is None else self.decode_tps.mean,
            memory=self.peak_rss_bytes,
            rounds={"": self.samples.get("decode_tps", [])},
        )

    def at(self, axis: str) -> float | None:
        """Where it lies on an axis, less being better."""
        if axis == "size":
            return float(self.file_bytes)
        if axis == "memory":
            return None if self.peak_rss_bytes is None else float(self.peak_rss_bytes)
        return None if self.decode_tps is None else -self.decode_tps.mean


WORSE = {SIZE: "is no larger", SPEED: "is no slower", MEMORY: "takes no more memory"}


def compare(
    candidates: Sequence[Candidate],
    texts: Mapping[str, Sequence[str]],
    *,
    reference: Path,
    context: int = 512,
    max_tokens: int | None = None,
    repetitions: int | None = 5,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Quality, size and (with ``repetitions``) speed of every candidate, who dominates whom, and that in words.

    ``texts`` are held-out, by name; the first decides. ``reference`` is the artifact that all are held against, such
    as the dense model in eight bits; windows are cut in its tokens. Raises InvalidRequest where there are fewer than
    two candidates or two of one name.
    """
    names = [one.name for one in candidates]
    if len(candidates) < 2:
        raise InvalidRequest(
            "one artifact makes no frontier: name another, or write --dense for the model it came from"
        )
    if len(set(names)) < len(names):
        raise InvalidRequest(f"two artifacts are called {max(names, key=names.count)}: rename one")
    settings = {"context": context, "max_tokens": max_tokens, "device": device}
    hashed = {path: artifact_sha256(path) for path in (reference, *(one.path for one in candidates))}
    own = _reference(reference, texts, settings, threads)
    points = []
    for number, one in enumerate(candidates, 1):
        say(f"quality of {one.name} ({number} of {len(candidates)})")
        points.append(_point(one, own, _increases(one.path, reference, hashed, texts, settings, threads)))
    if repetitions is not None:
        rows = bench(
            [one.path for one in candidates], repetitions=repetitions, threads=threads, device=device,
            kept=cache_folder() / "bench",
        )  # fmt: skip
        points = [
            replace(point, decode_tps=row.decode_tps, prefill_tps=row.prefill_tps, peak_rss_bytes=row.peak_rss_bytes,
                    samples={"decode_tps": row.samples["decode_tps"]})
            for point, row in zip(points, rows, strict=True)
        ]  # fmt: skip
    text = next(iter(texts))
    how = f"over the same bytes in windows of {context} tokens, held against {reference.name}"
    return {
        "how": f"{how}, ± one standard error, paired by window; {_speed(repetitions)}",
        "text": text,
        "texts": list(texts),
        "rows": [_row(point, points, text) for point in points],
        "verdicts": verdicts(points, text),
    }


def _speed(repetitions: int | None) -> str:
    """How speed was taken and what counts as a difference."""
    if not repetitions:
        return "speed not measured"
    memory = f"memory differs by more than {MEMORY_TOLERANCE:.0%}"
    if repetitions == 1:
        return f"speed: one round, pp512 and tg128; speeds are compared as they are, {memory}"
    told = "speeds differ where the 95 % interval of the ratio of their rounds excludes 1"
    return f"speed: {repetitions} rounds in alternation, pp512 and tg128; {told}, {memory}"


def _reference(
    path: Path, texts: Mapping[str, Sequence[str]], settings: Mapping[str, Any], threads: int | None
) -> dict[str, float]:
    """Text -> bits per byte of the reference; what was measured before is in the cache."""
    pairs = evaluate_kept(path, texts, special=True, threads=threads, **settings)
    return {name: pair.artifact.bits_per_byte for name, pair in pairs.items()}


def _increases(
    path: Path,
    reference: Path,
    hashed: Mapping[Path, str],
    texts: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    threads: int | None,
) -> dict[str, tuple[float, float | None]]:
    """Text -> increase of bits per byte over the reference's and its standard error; the reference's own is nothing."""
    if hashed[path] == hashed[reference]:
        return dict.fromkeys(texts, (0.0, None))
    pairs = evaluate_kept(path, texts, against=reference, special=True, threads=threads, **settings)
    return {name: (pair.increase, pair.increase_stderr) for name, pair in pairs.items() if pair.increase is not None}


def _point(
    one: Candidate, reference: Mapping[str, float], increases: Mapping[str, tuple[float, float | None]]
) -> Point:
    price = cost(one.path)
    return Point(
        name=one.name,
        kind=one.kind,
        format=price.format,
        quant=price.quant,
        file_bytes=price.file_bytes,
        parameters=price.parameters,
        bits_per_byte={name: reference[name] * (1 + share) for name, (share, _) in increases.items()},
        increase={name: share for name, (share, _) in increases.items()},
        increase_stderr={name: stderr for name, (_, stderr) in increases.items()},
    )


def dominating(point: Point, points: Sequence[Point], text: str, *axes: str) -> Point | None:
    """The best of those that are no worse than ``point`` in bits per byte and on all ``axes``, and better in one.

    Axes on which either was not measured do not count, nor does noise (:mod:`cusprun.benchmarks.dominance`).
    """
    own = point.figures(text)
    better = [other for other in points if other is not point and dominates(other.figures(text), own, axes)]
    return min(better, key=lambda other: other.increase[text], default=None)


def _row(point: Point, points: Sequence[Point], text: str) -> dict[str, Any]:
    by = {axis: found.name for axis in WORSE if (found := dominating(point, points, text, axis)) is not None}
    return {
        **asdict(point),
        "dominated": dominating(point, points, text, *WORSE) is not None,
        "dominated_by": by,
        "remark": remark(point, points, text),
    }


def remark(point: Point, points: Sequence[Point], text: str) -> str:
    """Whether something else is better all round, or by which measure it is worth having."""
    if (better := dominating(point, points, text, *WORSE)) is not None:
        return f"dominated by {better.name}"
    by = {axis: dominating(point, points, text, axis) for axis in WORSE if point.at(axis) is not None}
    lost = [f"in {axis} by {other.name}" for axis, other in by.items() if other is not None]
    return "on the frontier" + (f"; dominated {' and '.join(lost)}" if lost else "")


def verdicts(points: Sequence[Point], text: str) -> list[str]:
    """Every expert, and every artifact given by its path, beside what dominates it, in words."""
    said = []
    for point in points:
        if point.kind == "dense":
            continue
        for axis, words in WORSE.items():
            if point.at(axis) is None:
                continue
            other = dominating(point, points, text, axis)
            if other is None:
                said.append(f"{point.name}: nothing here that {words} loses as little on {text}.")
            else:
                theirs, own = percent(other.increase[text]), percent(point.increase[text])
                said.append(
                    f"{point.name} is dominated in {axis}: {other.name} has {_beside(other, point, axis, text)}, and "
                    f"its bits per byte on {text} are {theirs} over the reference's"
                    + (f", not {own}." if theirs != own else ", as here.")
                )
    return said


def _beside(other: Point, point: Point, axis: str, text: str) -> str:
    alike = advantage(other.figures(text), point.figures(text), axis) == 0
    if axis == SIZE:
        sizes = [f"{size / 1e6:.1f}" for size in (other.file_bytes, point.file_bytes)]
        return f"{sizes[0]} MB instead of {sizes[1]}" if sizes[0] != sizes[1] else f"{sizes[0]} MB too"
    if axis == MEMORY:
        assert other.peak_rss_bytes is not None
        assert point.peak_rss_bytes is not None
        sizes = [f"{size / 1e6:.0f}" for size in (other.peak_rss_bytes, point.peak_rss_bytes)]
        if alike:
            return f"{sizes[0]} MB of memory beside {sizes[1]}, alike within {MEMORY_TOLERANCE:.0%}"
        return f"{sizes[0]} MB of memory instead of {sizes[1]}"
    assert other.decode_tps is not None
    assert point.decode_tps is not None
    speeds = [f"{tps.mean:.1f}" for tps in (other.decode_tps, point.decode_tps)]
    if alike:
        return f"{speeds[0]} tokens/s beside {speeds[1]}, no difference that is shown"
    return f"{speeds[0]} tokens/s instead of {speeds[1]}"


def frontier_table(found: Mapping[str, Any]) -> Grid:
    """What :func:`compare` found, smallest first."""
    text = found["text"]
    headers = ("", "file\nMB", f"{text}\nbits/byte", "over\nreference", "decode\ntok/s", "RSS\nMB", "dominated")
    lines = []
    for row in sorted(found["rows"], key=lambda row: row["file_bytes"]):
        decode, memory = row["decode_tps"], row["peak_rss_bytes"]
        lines.append(
            (
                row["name"],
                f"{row['file_bytes'] / 1e6:.1f}",
                f"{row['bits_per_byte'][text]:.4f}",
                percent(row["increase"][text], row["increase_stderr"].get(text)),
                "" if decode is None else f"{decode['mean']:.1f} ± {decode['sd']:.1f}",
                "" if memory is None else f"{memory / 1e6:.0f}",
                "yes" if row["dominated"] else "no",
            )
        )
    note = "; dominated: another is no worse in anything here and better in something, as far as differences are shown"
    return Grid("Frontier", headers, tuple(lines), "\n".join([found["how"] + note, *found["verdicts"]]))
