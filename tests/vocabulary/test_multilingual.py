"""A large multilingual vocabulary trimmed to one language: the share of all parameters saved, and nothing is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cusprun.anatomy import describe
from cusprun.checkpoint import load_tokenizer
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes.llamacpp import LlamaCppRuntime
from cusprun.vocabulary import count_tokens, price_vocabulary, read_pieces, trim_model
from tests.pico import save_model
from tests.vocabulary.tokenizers_made import DECLARATION, random_strings

VOCABULARY = 150_000
SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyz",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "devanagari": "अआइईउऊएऐओऔकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह",
    "thai": "กขคฆงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ",
    "georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "armenian": "աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆ",
    "kana": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん",
    "hangul": "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허고노도로모보소오조초코토포호",
    "han": "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可",
}


def make_words(count: int, letters: str, chance: random.Random) -> list[str]:
    return ["".join(chance.choices(letters, k=chance.randint(2, 7))) for _ in range(count)]


def multilingual(words: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE of VOCABULARY tokens: characters out of bytes, then each word out of its beginnings."""
    character_of = bytes_to_unicode()
    vocab = {character: number for number, character in enumerate(character_of.values())}
    merges: list[tuple[str, str]] = []

    def join(left: str, right: str) -> str:
        if left + right not in vocab and len(vocab) < VOCABULARY:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
        return left + right

    def written(text: str) -> list[str]:
        return [character_of[byte] for byte in text.encode()]

    for letters in SCRIPTS.values():
        for letter in letters:
            parts = written(letter)
            whole = parts[0]
            for part in parts[1:]:
                whole = join(whole, part)
    for turn in zip(*words.values(), strict=True):  # a word of each script in turn, until the vocabulary is full
        for word in turn:
            whole = character_of[32]
            for letter in word:
                whole = join(whole, "".join(written(letter)))
    assert len(vocab) == VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    return tokenizer


def test_one_language_of_many(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    chance = random.Random(0)
    words = {name: make_words(6000, letters, chance) for name, letters in SCRIPTS.items()}
    tokenizer = multilingual(words)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2}
    ends = {"bos_token_id": VOCABULARY, "eos_token_id": VOCABULARY + 1, "pad_token_id": VOCABULARY + 1}
    dense = save_model(tmp_path / "dense", **sizes, **ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(dense)

    language = words["latin"][:1500]
    frequency = [1 / (rank + 1) for rank in range(len(language))]
    documents = ["".join(f" {word}" for word in chance.choices(language, frequency, k=300)) for _ in range(20)]
    prices = price_vocabulary(dense, {"language": documents}, {"language": 1.0}, tokens=400)
    used = int((count_tokens(documents, load_tokenizer(dense), prices.rows).counts > 0).sum())
    kept = prices.rows_for(6 * used)  # a word of seven letters has six steps
    trim_model(dense, kept, tmp_path / "trimmed")

    before, after = load_tokenizer(dense), load_tokenizer(tmp_path / "trimmed")
    for document in documents:
        assert after.tokenize(document) == before.tokenize(document)
    others = [" ".join(words[name][:50]) for name in SCRIPTS]
    for text in [*others, *DECLARATION.values(), *random_strings(500)]:
        assert after.decode(after(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    whole, rest = describe(dense).parameters, describe(tmp_path / "trimmed").parameters
    assert rest == whole - 32 * (prices.rows - len(kept))
    saved = 1 - rest / whole
    record_property("share of all parameters saved", saved)
    print(f"{prices.rows} tokens of {len(SCRIPTS)} scripts, {len(kept)} kept: {saved:.1%} of all parameters saved")
    assert saved > 0.9

    assert json.loads((tmp_path / "trimmed" / "config.json").read_text())["bos_token_id"] == len(kept) - 2
    report = export_gguf(tmp_path / "trimmed", tmp_path / "trimmed.gguf", "f32")
    runtime = LlamaCppRuntime(report.path, threads=1)
    for text in [*documents[:3], *others, *DECLARATION.values()]:
        assert runtime.encode(text) == after(text, add_special_tokens=False)["input_ids"]
    assert len(read_pieces(tmp_path / "trimmed").texts) == runtime.n_vocab == len(kept)
