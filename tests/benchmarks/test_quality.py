"""Perplexity, bits per byte and KL against plain computations that share no code with benchmarks/quality.py."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cusprun.benchmarks.losses import divergences, losses
from cusprun.benchmarks.quality import evaluate, evaluate_corpora, windows
from cusprun.benchmarks.tally import ratio_stderr
from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes import open_runtime
from tests import pico
from tests.benchmarks.conftest import UNICODE

KEYS = ["perplexity", "perplexity_stderr", "bits_per_byte", "tokens", "kld_mean", "top1_agreement", "context"]


def by_hand(folder: Path, text: str, context: int, first: int, bos: int | None = None) -> tuple[list[float], list[int]]:
    """Losses (nats) and token ids of the scored positions: transformers, one window after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = tokenizer.encode(text, add_special_tokens=False)
    if bos is not None:
        ids = [bos, *ids]
    found, scored = [], []
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        seen = [window[0] if bos is None else bos, *window[1:]]
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([seen])).logits[0], dim=-1)
        for position in range(first, context - 1):
            found.append(-float(rows[position, window[position + 1]]))
            scored.append(window[position + 1])
    return found, scored


def test_perplexity_equals_a_plain_loop(folder: Path, text: str) -> None:
    found = evaluate(folder, text, context=64)
    nll, _ = by_hand(folder, text, 64, first=32)
    assert found.tokens == len(nll)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-3)
    stderr = found.perplexity * float(np.std(nll)) / math.sqrt(len(nll) - 1)
    assert found.perplexity_stderr == pytest.approx(stderr, rel=1e-3)
    assert list(asdict(found)) == KEYS
    assert found.kld_mean is None
    assert found.top1_agreement is None
    json.dumps(asdict(found), allow_nan=False)


def test_folder_and_gguf_agree(folder: Path, gguf: Path, text: str) -> None:
    torch, llama = evaluate(folder, text, context=64), evaluate(gguf, text, context=64)
    assert llama.perplexity == pytest.approx(torch.perplexity, rel=1e-3)
    assert llama.bits_per_byte == pytest.approx(torch.bits_per_byte, rel=1e-3)
    assert llama.tokens == torch.tokens


def test_every_token_can_be_scored(folder: Path) -> None:
    runtime = open_runtime(folder)
    n = len(runtime.encode(UNICODE))
    found = evaluate(folder, UNICODE, context=32, score="all")
    assert found.tokens == n - math.ceil(n / 32)  # the first token of a window has nothing before it


def test_bits_per_byte_counts_the_bytes_of_split_characters(folder: Path) -> None:
    """Every token scored but the first: its bytes and the scored ones are the text's UTF-8 bytes."""
    runtime = open_runtime(folder)
    tokens = runtime.encode(UNICODE)
    context = len(tokens)
    assert any(b"\xf0\x9f\x99\x82" not in runtime.token_bytes(token) for token in tokens)
    found = evaluate(folder, UNICODE, context=context, score="all")
    n_bytes = len(UNICODE.encode()) - len(runtime.token_bytes(tokens[0]))
    nll, _ = by_hand(folder, UNICODE, context, first=0)
    assert found.bits_per_byte == pytest.approx(sum(nll) / math.log(2) / n_bytes, rel=1e-3)


def test_a_model_against_itself(folder: Path, gguf: Path, text: str) -> None:
    for one, other in ((folder, folder), (gguf, gguf)):
        found = evaluate(one, text, against=other, context=64, max_tokens=128)
        assert found.kld_mean == 0
        assert found.top1_agreement == 1
    found = evaluate(gguf, text, against=folder, context=64, max_tokens=128)
    assert found.kld_mean == pytest.approx(0, abs=1e-4)


def test_divergence_from_another_model(folder: Path, other: Path, text: str) -> None:
    pairs = evaluate_corpora(folder, {"one": text, "two": [text, "More."]}, against=other, context=64)
    assert list(pairs) == ["one", "two"]
    own = pairs["one"].against
    assert own is not None
    assert own.perplexity == pytest.approx(evaluate(other, text, context=64).perplexity, rel=1e-6)
    assert own.kld_mean is None
    assert pairs["one"].increase_stderr == ratio_stderr(pairs["one"].nats, pairs["one"].against_nats)
    for path, nats in ((folder, pairs["one"].nats), (other, pairs["one"].against_nats)):
        losses_by_hand, _ = by_hand(path, text, 64, first=32)
        assert nats == pytest.approx([sum(losses_by_hand[at : at + 31]) for at in range(0, len(losses_by_hand), 31)])
    expert = pairs["one"].artifact
    assert expert.kld_mean is not None
    assert expert.kld_mean > 0.1
    assert expert.top1_agreement is not None
    assert 0 <= expert.top1_agreement < 1


def test_the_spread_of_the_divergence(folder: Path, other: Path, text: str) -> None:
    """Percentiles and standard errors of KL by position: transformers in float64, one window after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = evaluate_corpora(folder, {"text": text}, against=other, context=64)["text"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (folder, other)]
    kld, same = [], []
    for start in range(0, len(ids) - 63, 64):
        with torch.no_grad():
            q, p = (
                torch.log_softmax(model(torch.tensor([ids[start : start + 64]])).logits[0, 32:63], dim=-1)
                for model in models
            )
        kld += (p.exp() * (p - q)).sum(dim=1).tolist()
        same += (p.argmax(dim=1) == q.argmax(dim=1)).tolist()
    found = pair.as_json()
    for name, expected in {
        "kld_mean": np.mean(kld),
        "kld_mean_stderr": np.std(kld, ddof=1) / math.sqrt(len(kld)),
        "kld_p50": np.percentile(kld, 50),
        "kld_p90": np.percentile(kld, 90),
        "kld_p99": np.percentile(kld, 99),
        "kld_max": max(kld),
        "top1_agreement": np.mean(same),
        "top1_agreement_stderr": np.std(same, ddof=1) / math.sqrt(len(same)),
    }.items():
        assert found[name] == pytest.approx(float(expected), rel=1e-3), name
    assert "kld_p99" not in evaluate_corpora(folder, {"text": text}, context=64)["text"].as_json()


def test_windows() -> None:
    assert windows(range(11), 4, "second-half") == [range(4), range(4, 8)]
    assert windows(range(11), 4, "all") == [range(4), range(4, 8), range(8, 11)]
    assert windows(range(9), 4, "all") == [range(4), range(4, 8)]
    assert windows(range(40), 4, "second-half", limit=3) == [range(4), range(12, 16), range(24, 28)]


def test_a_token_budget_takes_whole_windows(folder: Path, text: str) -> None:
    assert evaluate(folder, text, context=64, max_tokens=200).tokens == 3 * 31


def test_kl_direction_and_losses() -> None:
    """KL(reference || this) of two known distributions."""
    q, p = np.log([[0.25, 0.75]]).astype(np.float32), np.log([[0.5, 0.5]]).astype(np.float32)
    nll, reference_nll, kld, same = divergences(q + 3, p - 2, np.array([1]))
    assert nll[0] == pytest.approx(-math.log(0.75), rel=1e-6)
    assert reference_nll[0] == pytest.approx(math.log(2), rel=1e-6)
    assert kld[0] == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)
    assert not same[0]


def test_more_rows_than_one_softmax_takes() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    targets = np.arange(200) % 7
    exact = np.log(np.exp(logits.astype(float)).sum(1)) - logits[np.arange(200), targets]
    assert losses(logits, targets) == pytest.approx(exact)


def test_bos_takes_the_place_of_each_first_token(tmp_path: Path, text: str) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = pico.save_model(tmp_path / "bos", family="llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(folder)
    assert open_runtime(folder).bos == 1
    nll, _ = by_hand(folder, text, 64, first=32, bos=1)
    assert evaluate(folder, text, context=64).perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-3)


def test_what_cannot_be_measured_is_said(folder: Path, gguf: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="give more text or a smaller --context"):
        evaluate(folder, "Too short.", context=64)
    with pytest.raises(InvalidRequest, match="do not fill a window of 512"):
        evaluate(folder, text, max_tokens=100)
    with pytest.raises(InvalidRequest, match="write --context 4 or more"):
        evaluate(folder, text, context=2)
    with pytest.raises(InvalidRequest, match="write --context 512"):
        evaluate(gguf, text * 9, context=1024)
    with pytest.raises(InvalidRequest, match="no model folder"):
        evaluate(tmp_path / "nothing", text)


def test_a_damaged_gguf_is_a_message(gguf: Path, text: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copy(gguf, broken)
    data = bytearray(broken.read_bytes())
    data[-4000:] = b"\xff" * 4000  # NaN in float32
    broken.write_bytes(data)
    with pytest.raises(Failed, match="not finite"):
        evaluate(broken, text, context=64)
