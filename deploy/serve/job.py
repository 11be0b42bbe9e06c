"""What the engine is asked to generate, and the events by which it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cusprun.runtimes import Sampling


@dataclass(frozen=True)
class Job:
    """One request: ``choices`` answers to each of its prompts, one after the other."""

    prompts: tuple[tuple[int, ...], ...]  # token ids
    sampling: Sampling
    stop: tuple[str, ...] = ()
    choices: int = 1
    alternatives: int | None = None  # likeliest tokens told at each step; 0: the drawn one's logprob alone


@dataclass(frozen=True)
class Scored:
    """A token that was drawn, with its logarithmic probability (natural, before temperature) and the likeliest."""

    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text of answer ``index`` that is certain, with the tokens that became certain with it."""

    index: int
    text: str
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class End:
    """Answer ``index`` is done."""

    index: int
    reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Done:
    """All answers are."""

    prompt_tokens: int
    cached_tokens: int  # of them, not computed again
    completion_tokens: int


@dataclass(frozen=True)
class Broken:
    """The request ended before its answer did."""

    reason: Literal["timeout", "stopping", "error"]


Event = Piece | End | Done | Broken


@dataclass(eq=False)
class Ticket:
    """A job in the engine; ``deliver`` is called from the engine's threads."""

    job: Job
    deliver: Callable[[Event], None]
    deadline: float  # time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
