"""Windows over the same bytes for two artifacts whose vocabularies differ.

A window is cut in the tokens of one of them, the reference. Its text before the first scored token is the context, the
text from there on is scored; the other artifact reads the two texts in tokens of its own, each by itself, so that both
predict the same bytes after the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from cusprun.errors import InvalidRequest
from cusprun.progress import say
from cusprun.runtimes import Runtime


@dataclass(frozen=True)
class Passage:
    """One window in the tokens of one artifact, BOS in front where it has one; ``tokens[scored:]`` are scored."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def shown(self) -> int:
        """Tokens that the artifact reads: all but the last."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Passages:
    """The same bytes for both; ``n_bytes`` of them are scored."""

    own: Passage
    reference: Passage
    n_bytes: int


class SameBytes:
    """Turns windows of ``reference``'s tokens into passages for it and for ``artifact``."""

    def __init__(self, artifact: Runtime, reference: Runtime) -> None:
        self.artifact, self.reference = artifact, reference
        self._own_bytes = lru_cache(maxsize=None)(artifact.token_bytes)
        self._bytes = lru_cache(maxsize=None)(reference.token_bytes)
        self._lead = [] if reference.bos is None else [reference.bos]
        self._own_lead = [] if artifact.bos is None else [artifact.bos]

    def passages(self, window: Sequence[int], first: int, room: int | None = None) -> Passages | None:
        """``window`` for both artifacts; the logits of position ``first`` are the first to be scored.

        BOS stands in the place of the window's first token where the reference has one. A boundary that cuts a
        character, or before which ``artifact`` cannot spell the bytes, moves to the next token where all can, the end
        to the one before. ``room`` is the most tokens that ``artifact`` may be shown: where they are too few, the
        window of both begins later. None where no such boundaries are left.
        """
        pieces = [self._bytes(token) for token in window]
        begins = [at for at in range(len(self._lead), len(window)) if not _cuts(pieces[at])]
        if not begins:
            return None
        # Something has to be read before the first scored token: BOS, or a token that both hold.
        earliest = begins[0] if self._lead and self._own_lead else begins[0] + 1
        end = len(window)
        while end and not _is_text(b"".join(pieces[begins[0] : end])):
            end -= 1
        for scored in (at for at in begins if max(first + 1, earliest) <= at < end):
            own_scored = self.spell(window[scored:end])
            if own_scored:
                break
        else:
            return None
        for begin in (at for at in begins if at <= scored):
            own_context = self.spell(window[begin:scored])
            if own_context is None:
                continue
            seen, own_seen = [*self._lead, *window[begin:scored]], [*self._own_lead, *own_context]
            own = Passage((*own_seen, *own_scored), len(own_seen))
            if seen and own_seen and (room is None or own.shown <= room):
                reference = Passage((*seen, *window[scored:end]), len(seen))
                return Passages(own, reference, sum(map(len, pieces[scored:end])))
        return None

    def spell(self, tokens: Sequence[int]) -> list[int] | None:
        """The text of the reference's ``tokens`` in the artifact's, control tokens by their names; None where its
        tokenizer gives other bytes."""
        found: list[int] = []
        for is_text, group in groupby(tokens, key=lambda token: bool(self._bytes(token))):
            if is_text:
                spelled = self._spell_text(b"".join(map(self._bytes, group)))
                if spelled is None:
                    return None
                found += spelled
            else:
                found += [own for token in group for own in self._spell_control(token)]
        return found

    def _spell_control(self, token: int) -> list[int]:
        name = self.reference.decode([token])  # empty for a row that pads the embedding
        return self.artifact.encode(name, special=True) if name else []

    def _spell_text(self, wanted: bytes) -> list[int] | None:
        """Tokens whose bytes are ``wanted``, without the blank that SentencePiece puts in front of a text."""
        if not _is_text(wanted):
            return None
        text = wanted.decode()
        found = self.artifact.encode(text)
        if self._written(found) == b" " + wanted:
            if self._own_bytes(found[0]) == b" ":
                found = found[1:]
            elif text.startswith(" "):
                found = self.artifact.encode(text[1:])
        return found if self._written(found) == wanted else None

    def _written(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self._own_bytes, tokens))


def same_passages(
    runtime: Runtime, other: Runtime, cut: Mapping[str, Sequence[Sequence[int]]], first: int, room: int | None = None
) -> dict[str, list[Passages]]:
    """Every corpus's windows, cut in ``other``'s tokens, as passages for both.

    Raises InvalidRequest where no window of a corpus can be, or where one does not find ``room``.
    """
    found: dict[str, list[Passages]] = {}
    both = SameBytes(runtime, other)
    for name, held in cut.items():
        pairs = [both.passages(window, first) for window in held]
        kept = [pair for pair in pairs if pair is not None]
        if not kept:
            raise InvalidRequest(
                f"no window of the text {name!r} is the same bytes in the tokens of {runtime.path} and {other.path}: "
                "their tokenizers change the text, each in its own way; leave --against out"
            )
        if len(kept) < len(pairs):
            say(f"{name}: {len(pairs) - len(kept)} of {len(pairs)} windows left out: not the same bytes in both")
        if room is not None and (longest := max(pair.own.shown for pair in kept)) > room:
            shorter = [
                both.passages(window, first, room) for window, pair in zip(held, pairs, strict=True) if pair is not None
            ]
            kept = [pair for pair in shorter if pair is not None]
            if len(kept) < len(shorter):
                raise InvalidRequest(
                    f"{runtime.path} holds {room} tokens at most and a window of the text {name!r} takes {longest} of "
                    "its own: write a smaller --context"
                )
            say(f"{name}: windows longer than the {room} tokens that {runtime.path.name} holds begin later, for both")
        found[name] = kept
    return found


def _cuts(piece: bytes) -> bool:
    """Whether a text that begins with ``piece`` begins inside a character: with a continuation byte of UTF-8."""
    return bool(piece) and 0x80 <= piece[0] < 0xC0


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
