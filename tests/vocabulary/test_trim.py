"""A trimmed folder: every text still encodes, ids agree everywhere, kept tokens get the logits that they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from cusprun.anatomy import describe
from cusprun.checkpoint import Weights, load_model, load_tokenizer
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from cusprun.exporters.proof import HARD_STRINGS, tokenizer_difference
from cusprun.runtimes import Message, Sampling, open_runtime
from cusprun.runtimes.llamacpp import LlamaCppRuntime
from cusprun.runtimes.torch_runtime import TorchRuntime
from cusprun.vocabulary import close, count_tokens, expected_rates, order_removals, read_pieces, trim_model
from tests.pico import SENTENCES, save_model
from tests.vocabulary.tokenizers_made import DECLARATION, KINDS, make, random_strings


def trimmed(dense: Path, out: Path, text: str = DECLARATION["en"]) -> tuple[list[int], np.ndarray]:
    """Trims half of what can go, by how often ``text`` uses it; kept ids and the map from old to new."""
    pieces = read_pieces(dense)
    usage = count_tokens([text], load_tokenizer(dense), pieces.rows)
    order = order_removals(pieces, expected_rates({"text": usage}, {"text": 1.0}))
    gone = set(order[: len(order) // 2].tolist())
    kept = [identity for identity in range(pieces.rows) if identity not in gone]
    return kept, trim_model(dense, kept, out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_encodes_and_comes_back(tmp_path: Path, kind: str) -> None:
    dense = make(tmp_path / "dense", kind)
    kept, _ = trimmed(dense, tmp_path / "trimmed")
    before, after = load_tokenizer(dense), load_tokenizer(tmp_path / "trimmed")
    texts = [*random_strings(10_000), *HARD_STRINGS, *SENTENCES, *DECLARATION.values()]
    unknown = after.convert_tokens_to_ids("<unk>")
    fewer = 0
    for text in texts:
        ids, dense_ids = (each(text, add_special_tokens=False)["input_ids"] for each in (after, before))
        assert max(ids, default=0) < len(kept)
        assert unknown not in ids or "<unk>" in text
        assert after.decode(ids) == before.decode(dense_ids)
        if kind == "byte-level BPE":
            assert after.decode(ids, clean_up_tokenization_spaces=False) == text
        fewer += ids != dense_ids
    assert fewer >= 10  # the trimmed one does split otherwise


@pytest.mark.parametrize("kind", KINDS)
def test_ids_agree_everywhere(tmp_path: Path, kind: str) -> None:
    dense = make(tmp_path / "dense", kind)
    kept, new = trimmed(dense, tmp_path / "trimmed")
    before, after = load_tokenizer(dense), load_tokenizer(tmp_path / "trimmed")
    assert after.convert_ids_to_tokens(range(len(after))) == before.convert_ids_to_tokens(
        [identity for identity in kept if identity < len(before)]
    )
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(after, f"{name}_token_id") == new[getattr(before, f"{name}_token_id")]
    old, now = (json.loads((folder / "config.json").read_text()) for folder in (dense, tmp_path / "trimmed"))
    assert now["vocab_size"] == len(kept)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert now[name] == new[old[name]]
    old, now = (json.loads((folder / "generation_config.json").read_text()) for folder in (dense, tmp_path / "trimmed"))
    assert now["eos_token_id"] == new[old["eos_token_id"]].tolist()
    assert now["suppress_tokens"] == new[old["suppress_tokens"]].tolist()
    assert (
        after("rights <tool><|im_end|>")["input_ids"][-2:] == new[before("<tool><|im_end|>")["input_ids"][-2:]].tolist()
    )
    turns = [{"role": "user", "content": DECLARATION["en"]}]
    as_before = before.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert after.decode(after.apply_chat_template(turns, return_dict=True)["input_ids"]).startswith("<|im_start|>")
    assert after.decode(
        after.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    ) == before.decode(as_before)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_kept_tokens_keep_their_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    dense = make(tmp_path / "dense", **settings)
    kept, new = trimmed(dense, tmp_path / "trimmed")
    ids = load_tokenizer(tmp_path / "trimmed")(SENTENCES[0], return_tensors="pt")["input_ids"]
    old = torch.tensor(kept)[ids]
    with torch.no_grad():
        expected = load_model(dense)(old).logits[..., kept]
        found = load_model(tmp_path / "trimmed")(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert describe(tmp_path / "trimmed").vocab_size == len(kept) == int((new >= 0).sum())
    Weights(tmp_path / "trimmed").check(describe(tmp_path / "trimmed"))
    assert (new[kept] == np.arange(len(kept))).all()


def test_a_layout_of_its_own_widths_is_trimmed_too(tmp_path: Path) -> None:
    from tests.exporters.models import PER_LAYER

    dense = make(tmp_path / "dense", family="cusprun_llama", **PER_LAYER)
    kept, _ = trimmed(dense, tmp_path / "trimmed")
    ids = load_tokenizer(tmp_path / "trimmed")(SENTENCES[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = load_model(dense)(torch.tensor(kept)[ids]).logits[..., kept]
        assert torch.allclose(load_model(tmp_path / "trimmed")(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE"])
def test_gguf_has_the_same_ids(tmp_path: Path, kind: str) -> None:
    dense = make(tmp_path / "dense", kind)
    trimmed(dense, tmp_path / "trimmed")
    whole = export_gguf(dense, tmp_path / "dense.gguf", "f32")
    report = export_gguf(tmp_path / "trimmed", tmp_path / "trimmed.gguf", "f32")
    assert report.tokenizer_pre == whole.tokenizer_pre == ("smollm" if kind == "byte-level BPE" else "default")
    torch_runtime = TorchRuntime(tmp_path / "trimmed", threads=1)
    llama = LlamaCppRuntime(report.path, threads=1)
    texts = [*HARD_STRINGS, *SENTENCES, *DECLARATION.values(), *random_strings(300)]
    if kind == "SentencePiece BPE":
        texts = [text for text in texts if "<" not in text]
    assert tokenizer_difference(torch_runtime, llama, texts) is None
    assert llama.n_vocab == torch_runtime.n_vocab
    assert llama.end_tokens >= torch_runtime.end_tokens
    assert llama.bos == torch_runtime.bos
    prompt = llama.chat_prompt([Message("user", DECLARATION["en"])])
    assert prompt == torch_runtime.chat_prompt([Message("user", DECLARATION["en"])])
    tokens = llama.encode(prompt, special=True)
    assert tokens == torch_runtime.encode(prompt, special=True)
    assert np.allclose(llama.prefill(tokens), torch_runtime.prefill(tokens), atol=0.03)  # its cache is half precision
    answers = [list(each.generate(tokens, Sampling(max_tokens=8))) for each in (llama, torch_runtime)]
    assert answers[0] == answers[1]


def test_onnx_has_the_same_ids(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", KINDS[0])
    _, new = trimmed(dense, tmp_path / "trimmed")
    export_onnx(tmp_path / "trimmed", tmp_path / "onnx", "fp32")
    config, genai = (
        json.loads(path.read_text())
        for path in (tmp_path / "trimmed" / "config.json", tmp_path / "onnx" / "genai_config.json")
    )
    whole = json.loads((dense / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        ends = genai["model"][name]
        assert (ends[0] if isinstance(ends, list) else ends) == config[name] == new[whole[name]]
    assert genai["model"]["vocab_size"] == config["vocab_size"] < whole["vocab_size"]
    torch_runtime, onnx = TorchRuntime(tmp_path / "trimmed", threads=1), open_runtime(tmp_path / "onnx", threads=1)
    prompt = onnx.chat_prompt([Message("user", DECLARATION["en"])])
    tokens = onnx.encode(prompt, special=True)
    assert tokens == torch_runtime.encode(prompt, special=True)
    assert np.allclose(onnx.prefill(tokens), torch_runtime.prefill(tokens), atol=1e-3)
    answers = [list(each.generate(tokens, Sampling(max_tokens=8))) for each in (onnx, torch_runtime)]
    assert answers[0] == answers[1]
    for text in (*SENTENCES, *random_strings(100)):
        assert onnx.decode(onnx.encode(text)) == torch_runtime.decode(torch_runtime.encode(text))


def test_what_has_to_stay_cannot_go(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense")
    pieces = read_pieces(dense)
    least = close(pieces, ())
    assert {identity for identity, text in enumerate(pieces.texts) if text is not None and len(text) == 1} <= least
    assert pieces.added <= least
    assert set(load_tokenizer(dense)("user\n")["input_ids"]) <= least  # the chat template's own words
    for missing in (pieces.ids["A"], max(pieces.added), pieces.ids["Ġ"]):
        with pytest.raises(InvalidRequest, match="have to stay"):
            trim_model(dense, sorted(set(range(pieces.rows)) - {missing}), tmp_path / "out")
    with pytest.raises(InvalidRequest, match="between 0 and"):
        trim_model(dense, [*range(pieces.rows + 1)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trim_model(dense, sorted(least), tmp_path / "out")
    after = load_tokenizer(tmp_path / "out")
    assert after.decode(after(DECLARATION["de"])["input_ids"]) == DECLARATION["de"]


def test_files_that_would_tell_another_vocabulary_are_left_out(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"):
        (dense / name).write_text("{}")
    trimmed(dense, tmp_path / "trimmed")
    assert {path.name for path in (tmp_path / "trimmed").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert "source_sha256" not in json.loads((tmp_path / "trimmed" / "config.json").read_text())["cusprun"]


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = save_model(tmp_path / "model")
    for model in (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), models.BPE({"a": 0}, [])):
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)
        with pytest.raises(InvalidRequest, match="byte-level BPE, SentencePiece BPE with byte fallback, Unigram"):
            read_pieces(folder)
