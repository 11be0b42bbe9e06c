"""What a bench runs: sizes of prompt, generation and depth, and the processes that measure them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cusprun.errors import InvalidRequest

MAIN_PREFILL = 512  # the prompt of the headline where it is among the sizes


@dataclass(frozen=True)
class Run:
    """What one process measures after it has loaded the artifact; 0 tokens: that phase is left out."""

    prefill: int = 0  # tokens of the prompt, read in one go from an empty cache
    decode: int = 0  # single tokens, one after the other
    depth: int = 0  # tokens in the cache before the first of them
    context: int = 0  # tokens that the cache has room for at least, whatever is read
    cold: bool = False  # the files are dropped from the page cache before the load

    def tests(self) -> Iterator[Test]:
        if self.prefill:
            yield Test(self.prefill, 0, 0)
        if self.decode:
            yield Test(0, self.decode, self.depth)


@dataclass(frozen=True)
class Test:
    """One figure, in llama-bench's words."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """pp512, tg128 or tg128 @ d2048."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


@dataclass(frozen=True)
class Sizes:
    """Prompts from an empty cache, and generations of each length at each depth."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    depth: tuple[int, ...]

    def problems(self) -> list[str]:
        """What is no size, each with what to write instead."""
        found = []
        for name, least in (("prefill", 1), ("decode", 1), ("depth", 0)):
            values = getattr(self, name)
            found += [f"--{name} {value}: write {least} or more" for value in values if value < least]
            if not values:
                found.append(f"--{name} names no size: write one or more, with commas")
        return found

    def runs(self) -> list[Run]:
        """The main run, which gives the headline: prompt and generation in one process; then every other test alone."""
        main = Run(
            MAIN_PREFILL if MAIN_PREFILL in self.prefill else self.prefill[0],
            self.decode[0],
            0 if 0 in self.depth else self.depth[0],
        )
        main = replace(main, context=max(main.prefill, main.decode + main.depth))
        others = [Run(prefill=prompt) for prompt in self.prefill if prompt != main.prefill]
        others += [
            run for length in self.decode for depth in self.depth
            if (run := Run(decode=length, depth=depth)) != Run(decode=main.decode, depth=main.depth)
        ]  # fmt: skip
        return [main, *dict.fromkeys(others)]


MAIN = Sizes((512,), (128,), (0,))
FULL = Sizes((128, 512, 2048), (128,), (0, 2048))


def choose(given: Mapping[str, Sequence[int] | None], default: Sizes, contexts: Mapping[str, int]) -> Sizes:
    """The sizes given, by field, those of ``default`` for the rest; each artifact's context has to hold them.

    What is given and does not fit is refused; of the default what does not fit is left out, and where nothing would
    be left it is as much as fits. Raises InvalidRequest with every problem.
    """
    asked = {name: tuple(dict.fromkeys(values)) for name, values in given.items() if values is not None}
    sizes = replace(default, **asked)
    if wrong := sizes.problems():
        raise InvalidRequest.together(wrong)
    room = min(contexts.values())
    holds = f"{', '.join(name for name, context in contexts.items() if context == room)} holds {room} tokens"
    if "prefill" not in asked:
        sizes = replace(sizes, prefill=_fitting(sizes.prefill, room))
    if "decode" not in asked:
        sizes = replace(sizes, decode=_fitting(sizes.decode, room))
    if "depth" not in asked:
        sizes = replace(sizes, depth=_fitting(sizes.depth, room - max(sizes.decode)))
    wrong = [f"--prefill {size}: {holds}; write {room} or less" for size in sizes.prefill if size > room]
    longest = max(sizes.decode)
    if longest > room:
        wrong.append(f"--decode {longest}: {holds}; write {room} or less")
    else:
        wrong += [
            f"--depth {depth} and --decode {longest} after it: {holds}; write --depth {room - longest} or less"
            for depth in sizes.depth if depth + longest > room
        ]  # fmt: skip
    if wrong:
        raise InvalidRequest.together(wrong)
    return sizes


def _fitting(values: Sequence[int], room: int) -> tuple[int, ...]:
    """Those of a default that fit; as much as fits where none does, one at least."""
    return tuple(value for value in values if value <= room) or (max(room, 1),)
