"""A model folder's tokenizer, as the runtimes that read folders use it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers.normalizers import NFC

from cusprun.checkpoint import load_tokenizer
from cusprun.runtimes import Message
from cusprun.runtimes.chat_template import join_turns


class FolderTokenizer:
    """The part of :class:`cusprun.runtimes.Runtime` that is text."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)

    @property
    def composes(self) -> bool:
        """Whether the tokenizer brings a text into Unicode's composed form (NFC) first, as Qwen's does."""
        return isinstance(self._tokenizer.backend_tokenizer.normalizer, NFC)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))

    def decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def token_bytes(self, token: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token)
        if added is not None:
            return b"" if added.special else str(added.content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row that pads the embedding
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """Character to byte where the tokenizer writes bytes as printable characters (byte-level BPE), else None."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        if "ByteLevel" not in json.dumps([state["decoder"], state["pre_tokenizer"]]):
            return None
        return {character: byte for byte, character in bytes_to_unicode().items()}

    @cached_property
    def bos(self) -> int | None:
        with_special = self._tokenizer.encode("a")
        first = self._tokenizer.bos_token_id
        return int(first) if first is not None and with_special[:1] == [first] else None

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        if not self.has_chat_template:
            return join_turns(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
