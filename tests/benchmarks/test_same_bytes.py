"""Different vocabularies over the same bytes, against a computation from character offsets and plain transformers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cusprun.benchmarks import answers, quality
from cusprun.benchmarks.same_bytes import SameBytes
from cusprun.benchmarks.tasks import multiple_choice
from cusprun.cli import app
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes import open_runtime
from cusprun.vocabulary import close, read_pieces, trim_model
from tests import pico
from tests.benchmarks.conftest import UNICODE
from tests.benchmarks.test_tasks import CHOICES, Item, likelihoods
from tests.vocabulary.tokenizers_made import KINDS, make

CONTEXT = 64
evaluate = partial(quality.evaluate, context=CONTEXT, threads=1)
evaluate_corpora = partial(quality.evaluate_corpora, context=CONTEXT, threads=1)
TEXT = " ".join(f"{sentence} {UNICODE}" for sentence in pico.SENTENCES[:4])


def trimmed_of(folder: Path, share: float = 0.3) -> Path:
    """The model with a random share of its tokens, what these need among them."""
    pieces = read_pieces(folder)
    removable = pieces.removable.tolist()
    kept = random.Random(0).sample(removable, int(share * len(removable)))
    out = folder.parent / f"{folder.name}-trimmed"
    trim_model(folder, sorted(close(pieces, kept)), out)
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("same-bytes") / "dense", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def trimmed(dense: Path) -> Path:
    return trimmed_of(dense)


@dataclass
class ByHand:
    nats: float = 0.0
    tokens: int = 0
    n_bytes: int = 0
    longest: int = 0
    moved: tuple[int, ...] = (0, 0, 0)  # boundaries that cut a character: begin, first scored token, end

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes


def by_hand(dense: Path, artifact: Path, text: str, first: int, bos: str | None = None) -> ByHand:
    """Windows by the character offsets of the dense tokenizer; each part encoded by the artifact's and scored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    own: Any = AutoTokenizer.from_pretrained(artifact)
    model: Any = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    lead = [] if bos is None else [own.convert_tokens_to_ids(bos)]
    spans = [(0, 0), *offsets] if lead else offsets

    def whole(at: int) -> bool:
        return at in (0, len(spans)) or spans[at][0] >= spans[at - 1][1]

    found = ByHand()
    for start in range(0, len(spans) - CONTEXT + 1, CONTEXT):
        begin, scored, end = wanted = start + len(lead), start + first + 1, start + CONTEXT
        while not whole(begin):
            begin += 1
        scored = max(scored, begin if lead else begin + 1)
        while not whole(scored):
            scored += 1
        while not whole(end):
            end -= 1
        seen = own.encode(text[spans[begin][0] : spans[scored][0]], add_special_tokens=False)
        aim = text[spans[scored][0] : spans[end - 1][1]]
        ids = own.encode(aim, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([[*lead, *seen, *ids]])).logits[0]
        rows = torch.log_softmax(logits.double(), dim=-1)[len(lead) + len(seen) - 1 : -1]
        found.nats -= float(rows[range(len(ids)), ids].sum())
        found.tokens += len(ids)
        found.n_bytes += len(aim.encode())
        found.longest = max(found.longest, len(lead) + len(seen) + len(ids))
        pairs = zip(found.moved, (begin, scored, end), wanted, strict=True)
        found.moved = tuple(count + (at != by_rule) for count, at, by_rule in pairs)
    return found


@pytest.mark.parametrize(("score", "first"), [("second-half", CONTEXT // 2), ("all", 0)])
def test_bits_per_byte_equal_a_plain_computation(dense: Path, trimmed: Path, score: Any, first: int) -> None:
    tokens = len(open_runtime(dense, threads=1).encode(TEXT)) // CONTEXT * CONTEXT
    pair = evaluate_corpora(trimmed, {"text": TEXT}, against=dense, score=score, max_tokens=tokens)["text"]
    assert pair.against is not None
    assert not pair.same_vocabulary
    for found, folder in ((pair.artifact, trimmed), (pair.against, dense)):
        expected = by_hand(dense, folder, TEXT, first)
        if score == "second-half":
            assert min(expected.moved) > 0, expected.moved  # the text has characters across all three boundaries
        assert found.tokens == expected.tokens
        assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(expected.nats / expected.tokens), rel=1e-5)
        assert found.kld_mean is None
        assert found.top1_agreement is None
        assert found.context == CONTEXT
    assert by_hand(dense, trimmed, TEXT, first).longest > CONTEXT  # it was opened with more room than the dense model
    assert pair.artifact.tokens > pair.against.tokens
    assert pair.ratios["perplexity"] is None
    assert pair.increase == pytest.approx(pair.artifact.bits_per_byte / pair.against.bits_per_byte - 1)
    assert sum(pair.nats) / sum(pair.against_nats) == pytest.approx(1 + pair.increase)
    assert len(pair.nats) == len(pair.against_nats)


def test_a_model_that_begins_texts_with_a_token(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = pico.save_model(tmp_path / "bos", max_position_embeddings=1024)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(folder)
    small = trimmed_of(folder)
    assert open_runtime(small).bos is not None
    pair = evaluate_corpora(small, {"text": TEXT}, against=folder)["text"]
    expected = by_hand(folder, small, TEXT, CONTEXT // 2, bos="<|im_start|>")
    assert pair.artifact.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
    own = by_hand(folder, folder, TEXT, CONTEXT // 2, bos="<|im_start|>")
    assert pair.against is not None
    assert pair.against.bits_per_byte == pytest.approx(own.bits_per_byte, rel=1e-6)


def test_files_agree_with_folders(dense: Path, trimmed: Path, tmp_path: Path) -> None:
    for folder in (dense, trimmed):
        export_gguf(folder, tmp_path / f"{folder.name}.gguf", "f32")
    files = [tmp_path / f"{folder.name}.gguf" for folder in (trimmed, dense)]
    found = evaluate_corpora(files[0], {"text": TEXT}, against=files[1])["text"]
    torch = evaluate_corpora(trimmed, {"text": TEXT}, against=dense)["text"]
    assert not found.same_vocabulary
    for one, other in ((found.artifact, torch.artifact), (found.against, torch.against)):
        assert one is not None
        assert other is not None
        assert one.tokens == other.tokens
        assert one.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-3)


def test_equal_vocabularies_are_scored_as_ever(folder: Path, other: Path, text: str) -> None:
    alone = evaluate(folder, text)
    pair = evaluate_corpora(folder, {"text": text}, against=other)["text"]
    assert pair.same_vocabulary
    assert replace(pair.artifact, kld_mean=None, top1_agreement=None) == alone
    assert pair.against == evaluate(other, text)
    assert "remark" not in pair.as_json()
    assert pair.as_json()["bits_per_byte_increase"] == pair.increase


def test_dense_figures_do_not_depend_on_the_other_vocabulary(dense: Path, trimmed: Path) -> None:
    """Where no boundary cuts a character."""
    text = "\n".join(sentence for sentence in pico.SENTENCES * 3 if sentence.isascii())
    pair = evaluate_corpora(trimmed, {"text": text}, against=dense)["text"]
    alone = evaluate(dense, text)
    assert pair.against == alone


def spelled(artifact: Path, reference: Path, text: str) -> tuple[list[int], list[int]]:
    own, other = open_runtime(artifact, threads=1), open_runtime(reference, threads=1)
    found = SameBytes(own, other).spell(other.encode(text, special=True))
    assert found is not None
    return found, own.encode(text, special=True)


def test_control_tokens_stay_control_tokens(dense: Path, trimmed: Path) -> None:
    text = "<|im_start|>user\nWho pays the rent?<|im_end|>\n<|im_start|>assistant\nNiemand zahlt.<|im_end|>\n"
    found, own = spelled(trimmed, dense, text)
    assert found == own
    pair = evaluate_corpora(trimmed, {"text": text * 4}, against=dense, context=32, special=True)["text"]
    assert pair.against is not None
    assert pair.artifact.perplexity_stderr > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_of_every_kind_is_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """A blank that SentencePiece puts in front of a text is nowhere scored."""
    folder = make(tmp_path / "dense", kind)
    own, reference = open_runtime(trimmed_of(folder), threads=1), open_runtime(folder, threads=1)
    assert own.n_vocab < reference.n_vocab
    tokens = reference.encode(TEXT)
    both = SameBytes(own, reference)
    lead = 0 if reference.bos is None else 1

    def written(runtime: Any, part: Sequence[int]) -> bytes:
        return b"".join(runtime.token_bytes(token) for token in part)

    for start in range(0, len(tokens) - 48, 48):
        window = tokens[start : start + 48]
        found = both.passages(window, 24)
        assert found is not None
        sides = [(own, found.own), (reference, found.reference)]
        seen, scored = (
            {written(runtime, side.tokens[part(side.scored)]) for runtime, side in sides}
            for part in (lambda at: slice(lead, at), lambda at: slice(at, None))
        )
        assert len(seen) == len(scored) == 1
        aim = scored.pop()
        assert len(aim) == found.n_bytes
        assert aim.decode() in TEXT
        assert seen.pop() + aim in written(reference, window)
        assert found.reference.scored <= 25 + 8


def test_a_window_that_finds_no_room_begins_later_for_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"text": TEXT}
    wide = make(tmp_path / "wide", max_position_embeddings=2048)
    tight = make(tmp_path / "tight", max_position_embeddings=CONTEXT)
    expected = evaluate_corpora(trimmed_of(wide), texts, against=wide)["text"]
    found = evaluate_corpora(trimmed_of(tight), texts, against=tight)["text"]
    assert "begin later, for both" in capsys.readouterr().err
    assert found.artifact.tokens == expected.artifact.tokens
    assert found.artifact.bits_per_byte == pytest.approx(expected.artifact.bits_per_byte, rel=0.1)
    with pytest.raises(InvalidRequest, match="write a smaller --context"):
        evaluate_corpora(trimmed_of(tight, 0), texts, against=tight, score="all")


def test_multiple_choice_reads_the_same_texts(trimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path))  # where nothing was answered before
    monkeypatch.setattr(answers, "CONTEXT", 16)
    items = [Item(sentence, CHOICES, 0) for sentence in pico.SENTENCES[:3]]
    sums = [likelihoods(trimmed, item) for item in items]
    rigged = [Item(i.prompt, i.choices, int(np.argmax(s))) for i, s in zip(items, sums, strict=True)]
    assert multiple_choice(trimmed, rigged, threads=1).accuracy == 1  # opened with the room they take


def test_the_command_says_what_compares(dense: Path, trimmed: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    arguments = [
        "eval",
        str(trimmed),
        "--text",
        str(path),
        "--against",
        str(dense),
        "--context",
        str(CONTEXT),
        "--threads",
        "1",
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "perplexities per token do not" in shown.stdout
    assert "% bits per byte" in shown.stdout
    value = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert value["same_vocabulary"] is False
    assert value["bits_per_byte_increase"] == pytest.approx(
        value["bits_per_byte"] / value["against"]["bits_per_byte"] - 1
    )
    assert "perplexities per token do not" in value["remark"]
    assert value["kld_mean"] is None
