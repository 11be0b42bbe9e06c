"""llama.cpp cuts text as transformers does, for every kind of tokenizer that is exported."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cusprun.errors import InvalidRequest
from cusprun.exporters.end_tokens import read_end_tokens
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT
from cusprun.exporters.proof import HARD_STRINGS, compare_on_windows, tokenizer_difference
from cusprun.runtimes.llamacpp import LlamaCppRuntime, load_metadata
from cusprun.runtimes.torch_runtime import TorchRuntime
from tests.exporters.models import edit_config, windows
from tests.pico import SENTENCES, save_model

SPECIAL = ["<unk>", "<s>", "</s>"]


def words(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


def split(pattern: str) -> Any:
    return words(pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False))


def byte_level(pre_tokenizer: Any, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece() -> Tokenizer:
    """BPE as Llama 2 has it: spaces as ▁, one in front, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = trained(tokenizer, [], [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], 640)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def trained(tokenizer: Tokenizer, alphabet: list[str], special: list[str] | None = None, size: int = 512) -> Tokenizer:
    tokens: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in special or SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False, min_frequency=0
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def model_with(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    """A pico model folder with this tokenizer; a few embedding rows have no token."""
    save_model(folder, vocab_size=tokenizer.get_vocab_size() + 5, **settings)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def export_and_open(folder: Path, out: Path) -> tuple[TorchRuntime, LlamaCppRuntime]:
    report = export_gguf(folder, out, "f32")
    return TorchRuntime(folder, threads=1), LlamaCppRuntime(report.path, threads=1)


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "ignore_merges"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(False), False),
        ("smollm", words(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)), False),
        ("llama-bpe", split(LLAMA3_SPLIT), True),
        ("smaug-bpe", split(LLAMA3_SPLIT), False),
        ("qwen2", split(QWEN2_SPLIT), False),
        ("tekken", split(TEKKEN_SPLIT), True),
    ],
)
def test_byte_level_kinds(tmp_path: Path, name: str, pre_tokenizer: Any, ignore_merges: bool) -> None:
    folder = model_with(tmp_path / "model", byte_level(pre_tokenizer, ignore_merges))
    reference, candidate = export_and_open(folder, tmp_path / "x.gguf")
    assert candidate.info.metadata["tokenizer.ggml.pre"] == name
    assert tokenizer_difference(reference, candidate, [*HARD_STRINGS, *SENTENCES]) is None


def test_sentencepiece_kind(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", sentencepiece())
    reference, candidate = export_and_open(folder, tmp_path / "x.gguf")
    assert candidate.info.metadata["tokenizer.ggml.model"] == "llama"
    texts = [text for text in (*HARD_STRINGS, *SENTENCES) if "<" not in text]
    assert tokenizer_difference(reference, candidate, texts) is None
    tokens = candidate.encode(SENTENCES[2])
    assert reference.decode(tokens).strip() == candidate.decode(tokens).strip() == SENTENCES[2]


def test_llama_tokenizer_class(tmp_path: Path) -> None:
    """Llama 2 and Mistral folders name LlamaTokenizer, which transformers builds anew from the vocabulary."""
    folder = model_with(tmp_path / "model", sentencepiece())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    np.save(tmp_path / "windows.npy", windows(folder, 2, 32))
    found = compare_on_windows(str(report.path), str(folder), str(tmp_path / "windows.npy"), "f32", 1)
    assert found["tokenizer_difference"] is None
    assert found["kld_mean"] <= 1e-4


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed and reads the file")
def test_sentencepiece_file_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InvalidRequest, match="pip install sentencepiece"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_tokens_in_front_and_behind(tmp_path: Path, template: str) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(False))
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = model_with(tmp_path / "model", tokenizer)
    reference, candidate = export_and_open(folder, tmp_path / "x.gguf")
    assert candidate.info.metadata["tokenizer.ggml.add_bos_token"] is template.startswith("<s>")
    assert candidate.info.metadata["tokenizer.ggml.add_eos_token"] is template.endswith("</s>")
    assert reference.bos == candidate.bos == (1 if template.startswith("<s>") else None)


def test_types_of_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(False))
    tokenizer.add_tokens(["<tool>"])
    folder = model_with(tmp_path / "model", tokenizer)
    reference, candidate = export_and_open(folder, tmp_path / "x.gguf")
    types = candidate.info.metadata["tokenizer.ggml.token_type"]
    tool = tokenizer.token_to_id("<tool>")
    assert types[:3] == [3, 3, 3]  # control
    assert types[tool] == 4  # user defined
    assert types[tool + 1 :] == [5] * 5  # unused rows of the embedding
    assert candidate.encode("a<tool>b") == reference.encode("a<tool>b")
    assert candidate.token_bytes(tool) == reference.token_bytes(tool) == b"<tool>"
    assert candidate.token_bytes(1) == reference.token_bytes(1) == b""


def test_second_end_token_becomes_end_of_turn(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    reference, candidate = export_and_open(folder, tmp_path / "x.gguf")
    assert {2, 7} <= candidate.end_tokens
    assert reference.end_tokens == {2, 7}


@pytest.mark.parametrize(("ends", "config"), [(7, 2), (None, [2, 7])])
def test_an_end_token_that_is_not_the_tokenizers_ends_an_answer_in_every_export(
    tmp_path: Path, ends: Any, config: Any
) -> None:
    from cusprun.anatomy import describe
    from cusprun.exporters.onnx_folder import genai_config

    folder = save_model(tmp_path / "model")
    named = {} if ends is None else {"eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(named))
    edit_config(folder, eos_token_id=config)
    own = AutoTokenizer.from_pretrained(folder).eos_token_id
    _, candidate = export_and_open(folder, tmp_path / "x.gguf")
    assert candidate.info.metadata["tokenizer.ggml.eos_token_id"] == own
    assert {own, 7} <= candidate.end_tokens
    told = genai_config(folder, describe(folder), 64)["model"]["eos_token_id"]
    assert told[0] == own
    assert 7 in told


def test_end_tokens_of_a_tokenizer_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_end_tokens(tmp_path, None, 512) == [2, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 50256}')  # left over from a larger tokenizer
    assert read_end_tokens(tmp_path, 3, 512) == [3]


def test_a_tokenizer_that_composes_characters_is_proved_on_composed_text(tmp_path: Path) -> None:
    """Qwen's tokenizers bring text into NFC; llama.cpp does not."""
    tokenizer = byte_level(split(QWEN2_SPLIT))
    tokenizer.normalizer = normalizers.NFC()
    folder = model_with(tmp_path / "model", tokenizer)
    reference, candidate = export_and_open(folder, tmp_path / "x.gguf")
    assert candidate.info.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert tokenizer_difference(reference, candidate, ["combining e\u0301"]) is not None  # what only NFC joins
    np.save(tmp_path / "windows.npy", windows(folder, 2, 32))
    found = compare_on_windows(str(tmp_path / "x.gguf"), str(folder), str(tmp_path / "windows.npy"), "f32", 1)
    assert found["tokenizer_difference"] is None


def test_unknown_pre_tokenizer_asks_for_its_name(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", byte_level(split(r"\p{N}{1,4}|\s+")))
    with pytest.raises(InvalidRequest, match="tokenizer_pre"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")
    edit_config(folder, cusprun={"tokenizer_pre": "gpt-2"})
    report = export_gguf(folder, tmp_path / "x.gguf", "f32")
    assert load_metadata(report.path).metadata["tokenizer.ggml.pre"] == report.tokenizer_pre == "gpt-2"


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    other = model_with(tmp_path / "other", sentencepiece())
    shutil.copy(other / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(InvalidRequest, match="different models"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InvalidRequest, match="tokenizer"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")


def test_unigram_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    folder = save_model(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(InvalidRequest, match="Unigram"):
        export_gguf(folder, tmp_path / "x.gguf", "f32")
