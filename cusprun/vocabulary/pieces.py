"""The tokenizer of a model folder as pieces with ids, and the same tokenizer with fewer of them.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM), SentencePiece BPE with byte fallback (Llama 2, Mistral) and Unigram
(SentencePiece): in each, a text that no longer finds a piece falls into smaller ones, down to bytes or characters.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cusprun.anatomy import read_config
from cusprun.checkpoint import load_tokenizer
from cusprun.errors import Failed, InvalidRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["byte-level BPE", "SentencePiece BPE", "Unigram"]
SUPPORTED = "byte-level BPE, SentencePiece BPE with byte fallback, Unigram"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
GENERATION = "generation_config.json"
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids")


@dataclass(frozen=True)
class Pieces:
    """A tokenizer by id. ``rows`` of the embedding; ids without a piece pad it."""

    folder: Path
    kind: Kind
    rows: int
    texts: tuple[str | None, ...]  # as tokenizer.json writes them, (rows,)
    added: frozenset[int]  # special and other added tokens
    protected: frozenset[int]  # what has to stay for every text to be written, and for the chat template
    state: dict[str, Any]  # tokenizer.json as transformers loads it

    @property
    def removable(self) -> np.ndarray:
        """Ids that may go, ascending, int64; padding rows among them."""
        return np.array([identity for identity in range(self.rows) if identity not in self.protected], dtype=np.int64)

    @cached_property
    def merges(self) -> tuple[tuple[str, str], ...]:
        """BPE's merges in the order of their ranks; none in Unigram."""
        return tuple(_pair(merge) for merge in self.state["model"].get("merges", []))

    @cached_property
    def needs(self) -> dict[int, tuple[int, int]]:
        """The two parts that the dense tokenizer merges last when it reaches a piece; only pieces that merges make."""
        ways: dict[str, list[tuple[str, str]]] = {}
        for left, right in self.merges:
            ways.setdefault(left + right, []).append((left, right))
        ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}
        needs = {}
        for text, found in ways.items():
            last = found[0] if len(found) == 1 else _last_merge(text, ranks)
            if last is not None and text in self.ids:
                needs[self.ids[text]] = (self.ids[last[0]], self.ids[last[1]])
        return needs

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece to id, added tokens that the model itself does not know left out."""
        vocab = self.state["model"]["vocab"]
        if self.kind == "Unigram":
            return {text: identity for identity, (text, _) in enumerate(vocab)}
        return dict(vocab)

    @cached_property
    def bytes(self) -> tuple[bytes, ...]:
        """What each id stands for in a text, (rows,); empty for padding and special tokens."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def written(identity: int, text: str | None) -> bytes:
            if text is None:
                return b""
            if identity in self.added:
                return text.encode()
            if self.kind == "byte-level BPE":
                return bytes(byte_of[character] for character in text if character in byte_of)
            if BYTE.fullmatch(text):
                return bytes([int(text[3:5], 16)])
            return text.replace("\u2581", " ").encode()

        return tuple(written(identity, text) for identity, text in enumerate(self.texts))

    def tokenizer(self, kept: Sequence[int] | None = None) -> Tokenizer:
        """The tokenizer, special tokens' texts read as tokens; with ``kept``, of these ids alone as :meth:`trimmed`.

        Raises Failed where the tokenizers library would give other ids.
        """
        from tokenizers import Tokenizer

        if kept is None:
            return Tokenizer.from_str(json.dumps(self.state))
        found = Tokenizer.from_str(json.dumps(self.trimmed(kept)))
        ids = found.get_vocab(with_added_tokens=True)
        for new, old in enumerate(kept):
            if (text := self.texts[old]) is not None and ids.get(text) != new:
                raise Failed(f"{self.folder}: token {text!r} cannot be given the id {new}")
        return found

    def trimmed(self, kept: Sequence[int]) -> dict[str, Any]:
        """tokenizer.json with only the ids ``kept`` (ascending), which become 0, 1, 2 and so on.

        Of BPE's merges those stay whose parts and product stay.
        """
        inside = {self.texts[identity] for identity in kept}
        new = {old: number for number, old in enumerate(kept)}
        state = copy.deepcopy({key: value for key, value in self.state.items() if key != "model"})
        model = {key: value for key, value in self.state["model"].items() if key not in ("vocab", "merges")}
        if self.kind == "Unigram":
            vocab = self.state["model"]["vocab"]
            model["vocab"] = [vocab[old] for old in kept if old < len(vocab)]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {text: new[old] for text, old in self.ids.items() if old in new}
            model["merges"] = [
                [left, right]
                for left, right in self.merges
                if left in inside and right in inside and left + right in inside
            ]
        for entry in state["added_tokens"]:
            entry["id"] = new[entry["id"]]
        _renumber(state.get("post_processor"), new)
        if isinstance(state.get("padding"), dict):
            state["padding"]["pad_id"] = new[state["padding"]["pad_id"]]
        state["truncation"] = None
        state["model"] = model
        return state


def _last_merge(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """Byte-pair encoding of ``text`` from its characters; None where it does not end in one piece."""
    parts = list(text)
    while len(parts) > 2:
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 and (parts[0], parts[1]) in ranks else None


def read_pieces(folder: Path) -> Pieces:
    """The tokenizer of a model folder.

    Raises InvalidRequest naming the kinds that can be trimmed where it is another, or where it has more tokens than
    the embedding has rows; Failed where transformers cannot load it.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidRequest(f"{folder} has a tokenizer without tokenizer.json; the vocabulary stays: --vocab keep")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(folder, state)
    vocab = state["model"]["vocab"]
    named = dict(vocab) if kind != "Unigram" else {text: identity for identity, (text, _) in enumerate(vocab)}
    texts = {identity: text for text, identity in named.items()}
    texts.update({entry["id"]: entry["content"] for entry in state["added_tokens"]})
    rows = int(config["vocab_size"])
    if max(texts) >= rows:
        raise InvalidRequest(
            f"{folder}: the tokenizer has token ids up to {max(texts)} and the embedding {rows} rows; "
            "they belong to different models"
        )
    added = frozenset(entry["id"] for entry in state["added_tokens"])
    protected = set(added) | _smallest(kind, named) | set(_named_ids(state.get("post_processor")))
    for settings in (config, _generation(folder)):
        protected |= {identity for identity in named_tokens(settings) if 0 <= identity < rows}
    unknown = state["model"].get("unk_token")
    protected |= {named[unknown]} if unknown in named else set()
    protected |= {state["model"]["unk_id"]} if state["model"].get("unk_id") is not None else set()
    protected |= _template_ids(tokenizer)
    return Pieces(
        folder, kind, rows, tuple(texts.get(identity) for identity in range(rows)), added, frozenset(protected), state
    )


def named_tokens(settings: Mapping[str, Any]) -> list[int]:
    """Every token id that a config.json or generation_config.json names."""

    def numbers(value: Any) -> list[int]:
        if isinstance(value, list):
            return [number for entry in value for number in numbers(entry)]
        return [value] if isinstance(value, int) and not isinstance(value, bool) else []

    return [number for key, value in settings.items() if _names_tokens(key) for number in numbers(value)]


def renumbered(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The same settings with new token ids; ids that are in no row stay as they are."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(entry) for entry in value]
        return new.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {key: change(value) if _names_tokens(key) else value for key, value in settings.items()}


def _names_tokens(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in ID_LISTS


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} must hold one JSON object")
    return found


def _kind(folder: Path, state: dict[str, Any]) -> Kind:
    model = state["model"]
    if model["type"] == "Unigram":
        return "Unigram"
    if model["type"] == "BPE" and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix"):
        if '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")]):
            return "byte-level BPE"
        if model.get("byte_fallback"):
            return "SentencePiece BPE"
    detail = " without bytes" if model["type"] == "BPE" else ""
    raise InvalidRequest(
        f"{folder} has a {model['type']} tokenizer{detail}; the vocabulary of these can be trimmed: {SUPPORTED}. "
        "Write --vocab keep"
    )


def _smallest(kind: Kind, named: Mapping[str, int]) -> set[int]:
    """The pieces that everything falls into in the end: bytes, and single characters where there are no bytes."""
    if kind == "byte-level BPE":
        return {identity for text, identity in named.items() if len(text) == 1}
    fallback = {identity for text, identity in named.items() if BYTE.fullmatch(text)}
    if len(fallback) == 256:
        return fallback | ({named["\u2581"]} if "\u2581" in named else set())
    return fallback | {identity for text, identity in named.items() if len(text) == 1}


def _template_ids(tokenizer: Any) -> set[int]:
    """Tokens that the chat template writes of itself, whoever says what."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    from jinja2 import TemplateError

    found: set[int] = set()
    user, assistant = {"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}
    for turns in ([user], [{"role": "system", "content": "2"}, user], [user, assistant, user]):
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # its word for turns that it does not take, a system turn say
            continue
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def _named_ids(processor: Any) -> list[int]:
    """Ids that a post-processor adds to a text."""
    if not isinstance(processor, dict):
        return []
    found = [identity for part in processor.get("processors", []) for identity in _named_ids(part)]
    if isinstance(special := processor.get("special_tokens"), dict):
        found += [identity for entry in special.values() for identity in entry["ids"]]
    return found + [processor[name][1] for name in ("sep", "cls") if isinstance(processor.get(name), list)]


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Gives the ids of :func:`_named_ids` their new numbers, in place."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors", []):
        _renumber(part, new)
    if isinstance(special := processor.get("special_tokens"), dict):
        for entry in special.values():
            entry["ids"] = [new[identity] for identity in entry["ids"]]
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name][1] = new[processor[name][1]]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
