"""The tokenizer of a model folder as GGUF metadata: byte-level BPE and SentencePiece-like BPE.

What is written is what transformers really loads, so that torch and llama.cpp see the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.end_tokens import read_end_tokens

# llama.cpp cuts text by a built-in rule that tokenizer.ggml.pre names; these are the rules of the families we export,
# as they stand in tokenizer.json: the steps before byte-level BPE. Read in llama.cpp's llama-vocab.cpp.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[str, ...], dict[bool, str]] = {  # steps -> ignore_merges -> name
    ("bytes by words",): {False: "gpt-2"},
    ("single digits", "bytes by words"): {False: "smollm"},
    (LLAMA3_SPLIT, "bytes"): {True: "llama-bpe", False: "smaug-bpe"},
    (QWEN2_SPLIT, "bytes"): {False: "qwen2"},
    (TEKKEN_SPLIT, "bytes"): {True: "tekken"},
}
HOW_TO_NAME = 'name it in config.json as {"cusprun": {"tokenizer_pre": "<llama.cpp\'s name>"}}'


@dataclass(frozen=True)
class Vocabulary:
    """Everything of a tokenizer that a GGUF file holds, in the order of the ids."""

    model: str  # gpt2 (byte-level BPE) or llama (SentencePiece)
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]  # SentencePiece alone
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    special: SpecialVocab


def read_vocabulary(folder: Path, rows: int, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of ``folder`` for an embedding of ``rows`` rows; rows without a token become unused ones.

    Raises InvalidRequest where it is of a kind that llama.cpp does not have, or has more tokens than ``rows``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        hint = ""
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            hint = " (to read tokenizer.model alone, pip install sentencepiece)"
        raise InvalidRequest(f"{folder} has no tokenizer that transformers loads{hint}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidRequest(
            f"{folder} has a tokenizer without tokenizer.json: save it once with transformers' fast form"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise InvalidRequest(f"{folder} has a {model['type']} tokenizer; BPE (byte-level or SentencePiece) is exported")
    tokens, types = _tokens(folder, state, rows)
    sentencepiece = bool(model.get("byte_fallback"))
    special = SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=rows)
    if not sentencepiece:
        special.merges = [" ".join(part.replace(" ", "Ġ") for part in _pair(merge)) for merge in model["merges"]]
    with_special, without = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    special.add_special_token = {}
    for kind in ("bos", "eos", "pad", "unk"):
        identity = getattr(tokenizer, f"{kind}_token_id")
        if identity is not None and identity < rows:
            special.special_token_ids[kind] = identity
    ends = read_end_tokens(folder, special.special_token_ids.get("eos"), rows)
    if ends:
        special.special_token_ids.setdefault("eos", ends[0])
    if "eot" not in special.special_token_ids and (others := ends[1:]):
        special.special_token_ids["eot"] = others[0]  # llama.cpp's name for the end of a turn
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else _pre_name(folder, state, config),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, model["merges"]) if sentencepiece else (),
        add_space_prefix=sentencepiece and _prepends_space(state),
        add_bos=with_special[:1] == [tokenizer.bos_token_id] and without[:1] != with_special[:1],
        add_eos=with_special[-1:] == [tokenizer.eos_token_id] and without[-1:] != with_special[-1:],
        special=special,
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Adds the tokenizer's keys to ``writer``."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    vocabulary.special.add_to_gguf(writer, quiet=True)


def _tokens(folder: Path, state: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Text and type of each id below ``rows``."""
    texts: dict[int, str] = {identity: text for text, identity in state["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    texts.update({identity: entry["content"] for identity, entry in added.items()})
    if max(texts) >= rows:
        raise InvalidRequest(
            f"{folder}: the tokenizer has token ids up to {max(texts)} and the embedding {rows} rows; "
            "they belong to different models"
        )
    unknown = state["model"].get("unk_token")
    byte_fallback = bool(state["model"].get("byte_fallback"))
    types = []
    for identity in range(rows):
        text = texts.get(identity)
        if text is None:
            kind = TokenType.UNUSED
        elif byte_fallback and text == unknown:
            kind = TokenType.UNKNOWN
        elif identity in added:
            kind = TokenType.CONTROL if added[identity]["special"] else TokenType.USER_DEFINED
        elif byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        types.append(int(kind))
    return tuple(texts.get(identity, f"[PAD{identity}]") for identity in range(rows)), tuple(types)


def _pre_name(folder: Path, state: dict[str, Any], config: Mapping[str, Any]) -> str:
    noted = config.get("cusprun")
    if isinstance(noted, dict) and noted.get("tokenizer_pre"):
        return str(noted["tokenizer_pre"])
    steps = tuple(_steps(state.get("pre_tokenizer")))
    names = PRE_TOKENIZERS.get(steps, {})
    name = names.get(bool(state["model"].get("ignore_merges")))
    normalizer = (state.get("normalizer") or {}).get("type")
    if name is None or normalizer not in (None, "NFC"):
        rule = " then ".join(steps) + (f" after {normalizer}" if normalizer else "")
        raise InvalidRequest(f"{folder}: llama.cpp's name for the pre-tokenizer ({rule}) is not known: {HOW_TO_NAME}")
    return name


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The steps of a pre-tokenizer in the words of PRE_TOKENIZERS; unknown ones as their JSON."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return ["bytes by words" if pre_tokenizer["use_regex"] else "bytes"]
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return ["single digits"]
    isolated = kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]
    if isolated and "Regex" in pre_tokenizer["pattern"]:
        return [str(pre_tokenizer["pattern"]["Regex"])]
    return [json.dumps(pre_tokenizer)]


def _prepends_space(state: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text: a Prepend normalizer or Metaspace."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Any]) -> tuple[float, ...]:
    """Scores by which llama.cpp merges pieces in the order of ``merges``: a piece's score is minus its first rank.

    SentencePiece writes its BPE scores the same way. Pieces that no merge makes are never reached by merging.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(_pair(merge)), rank)
    return tuple(
        -float(ranks.get(token, len(merges))) if kind == TokenType.NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    )


def _pair(merge: Any) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else list(merge)
    if len(pair) != 2:
        raise Failed(f"the tokenizer has a merge of {len(pair)} parts: {merge!r}")
    return pair
