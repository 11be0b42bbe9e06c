"""Small tokenizers of every kind that can be trimmed, with a model folder around them, and texts in many scripts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.pico import CHAT_TEMPLATE, SENTENCES, save_model

SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ("byte-level BPE", "SentencePiece BPE", "Unigram")

# Article 1 of the Universal Declaration of Human Rights, in the catalog's languages.
DECLARATION = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão.",
}


def random_strings(count: int, seed: int = 0) -> list[str]:
    """Strings of 1 to 24 characters from all of Unicode but surrogates, every other one mostly ASCII."""
    chance = random.Random(seed)

    def character(plain: bool) -> str:
        if plain and chance.random() < 0.8:
            return chr(chance.randint(32, 126))
        code = chance.randint(1, 0x10FFFF)
        return " " if 0xD800 <= code <= 0xDFFF else chr(code)

    return ["".join(character(number % 2 == 0) for _ in range(chance.randint(1, 24))) for number in range(count)]


def byte_level(size: int = 700) -> Tokenizer:
    """As SmolLM2 has it: single digits, then GPT-2's words."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_special(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, *DECLARATION.values()] * 4, trainer)
    return tokenizer


def sentencepiece(size: int = 900) -> Tokenizer:
    """As Llama 2 has it: spaces as ▁, one in front, bytes for unknown characters, a begin token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=_special(bytes_too=True), show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, *DECLARATION.values()] * 4, trainer)
    tokenizer = _only_special(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def unigram(size: int = 900) -> Tokenizer:
    """SentencePiece's other model, with bytes for unknown characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=_special(), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, *DECLARATION.values()] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


MAKERS = {"byte-level BPE": byte_level, "SentencePiece BPE": sentencepiece, "Unigram": unigram}


def make(folder: Path, kind: str = "byte-level BPE", *, padding: int = 5, **settings: Any) -> Path:
    """A pico model folder with a tokenizer of ``kind``, an added token behind the vocabulary and rows of padding."""
    tokenizer = MAKERS[kind]()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    size = tokenizer.get_vocab_size()
    ends = {name: tokenizer.token_to_id(text) for name, text in (("bos", "<s>"), ("eos", "</s>"))}
    turn = tokenizer.token_to_id("<|im_end|>")
    settings = {"bos_token_id": ends["bos"], "eos_token_id": ends["eos"], "pad_token_id": turn, **settings}
    save_model(folder, vocab_size=size + padding, **settings)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    generation = {"bos_token_id": ends["bos"], "eos_token_id": [ends["eos"], turn], "suppress_tokens": [turn - 1]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _special(bytes_too: bool = False) -> list[str | AddedToken]:
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))] if bytes_too else SPECIAL
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _only_special(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer makes the bytes special tokens; here they are ordinary ones."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))
