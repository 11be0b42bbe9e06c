"""Text up to the first stop string; what may yet become one is held back, so that no part of it is ever shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Takes text in pieces, however the stop strings are cut up over them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False
        self.released = 0  # characters given out

    def feed(self, text: str) -> str:
        """What is certain to be shown now. After a hit nothing is."""
        if self.hit:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.hit = bool(found)
        keep = 0 if self.hit else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sure = min(found) if found else len(self._held) - keep
        shown, self._held = self._held[:sure], "" if self.hit else self._held[sure:]
        self.released += len(shown)
        return shown

    def flush(self) -> str:
        """What was held back in vain."""
        shown, self._held = self._held, ""
        self.released += len(shown)
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``; less than all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
