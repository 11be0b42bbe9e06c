"""`serve` as OpenAI's own client sees it, and what it answers to requests that make no sense."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI

from cusprun.deploy.serve.settings import Settings
from cusprun.errors import InvalidRequest
from cusprun.exporters.onnx import export_onnx
from cusprun.runtimes import Message, Runtime, Sampling, open_runtime
from cusprun.runtimes.generation import generate_tokens
from tests.deploy.serving import COMMAND, Server, answer_alone, said, serving, small_gguf

MOST = 24
QUESTION = "Wer zahlt die Miete?"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gguf(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def alone(gguf: Path) -> Iterator[Runtime]:
    """The same file in this process."""
    runtime = open_runtime(gguf, context=512, threads=1)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[Server]:
    with serving(gguf, "--max-tokens", "300", "--max-body", "20KB", "--cors", "https://page.example") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as found:
        yield found


def ask(client: OpenAI, text: str = QUESTION, **settings: Any) -> Any:
    settings = {"max_tokens": MOST, **settings}
    return client.chat.completions.create(model="pico", messages=[{"role": "user", "content": text}], **settings)


def test_chat(client: OpenAI, alone: Runtime) -> None:
    found = ask(client)
    assert found.choices[0].message.content == answer_alone(alone, QUESTION, MOST)
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == MOST
    assert found.usage.prompt_tokens == len(alone.encode(alone.chat_prompt([Message("user", QUESTION)]), special=True))
    assert found.usage.total_tokens == found.usage.prompt_tokens + MOST


def test_a_conversation_with_all_roles_and_parts(client: OpenAI, alone: Runtime) -> None:
    found = client.chat.completions.create(
        model="pico",
        max_completion_tokens=MOST,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "pays?"}]},
            {"role": "assistant", "content": "The tenant."},
            {"role": "user", "content": QUESTION},
        ],
    )
    turns = [("system", "Be brief."), ("user", "Who pays?"), ("assistant", "The tenant."), ("user", QUESTION)]
    prompt = alone.chat_prompt([Message(*turn) for turn in turns])
    assert found.choices[0].message.content == said(alone, alone.encode(prompt, special=True), MOST)


def test_streams_say_the_same(client: OpenAI) -> None:
    whole = ask(client, n=2, temperature=1, seed=5)
    chunks = list(ask(client, n=2, temperature=1, seed=5, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_seeds(client: OpenAI, alone: Runtime) -> None:
    first, again, other = (ask(client, temperature=1, seed=seed).choices[0].message.content for seed in (3, 3, 4))
    assert first == again != other
    prompt = alone.encode(alone.chat_prompt([Message("user", QUESTION)]), special=True)
    drawn = generate_tokens(alone, prompt, Sampling(1.0, 1.0, MOST, 3))
    assert first == b"".join(map(alone.token_bytes, drawn)).decode(errors="replace")
    free = {ask(client, temperature=2).choices[0].message.content for _ in range(4)}
    assert len(free) > 1  # without a seed each draws by itself


@pytest.mark.parametrize("stream", [False, True])
def test_stop_words_wherever_tokens_end(client: OpenAI, alone: Runtime, stream: bool) -> None:
    text = answer_alone(alone, QUESTION, MOST)
    for length, at in ((1, 4), (3, 7), (9, 12)):
        stop = text[at : at + length]
        found = ask(client, stop=[stop, "never said"], stream=stream)
        if stream:
            chunks = list(found)
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            content, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert content == text[: text.index(stop)]
        assert reason == "stop"
    assert ask(client, stop=text[-3:] + "x").choices[0].message.content == text  # held back in vain


def test_logprobs(client: OpenAI, alone: Runtime) -> None:
    found = ask(client, logprobs=True, top_logprobs=3, max_tokens=6)
    prompt = alone.encode(alone.chat_prompt([Message("user", QUESTION)]), special=True)
    told = found.choices[0].logprobs.content
    logits = alone.prefill(prompt)
    for entry in told:
        wide = logits.astype(np.float64)
        expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
        best = np.argsort(-expected)[:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected[best].tolist(), abs=1e-9)
        assert bytes(entry.top_logprobs[0].bytes) == alone.token_bytes(int(best[0])) == bytes(entry.bytes)
        logits = alone.step(int(best[0]))
    assert len(told) == 6
    streamed = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=3, max_tokens=6, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == told
    plain = client.completions.create(model="pico", prompt="The tenant", logprobs=2, max_tokens=5).choices[0]
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs) == len(plain.logprobs.text_offset) == 5
    assert all(len(top) <= 2 for top in plain.logprobs.top_logprobs)


def test_completions(client: OpenAI, alone: Runtime) -> None:
    prompts = ["The tenant shall", "Le locataire"]
    expected = [said(alone, alone.encode(prompt), MOST) for prompt in prompts]
    found = client.completions.create(model="pico", prompt=prompts, max_tokens=MOST)
    assert [choice.text for choice in found.choices] == expected
    tokens = client.completions.create(model="pico", prompt=alone.encode(prompts[0]), max_tokens=MOST, echo=False)
    assert tokens.choices[0].text == expected[0]
    chunks = client.completions.create(model="pico", prompt=prompts[0], max_tokens=MOST, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]


def test_models_health_and_description(client: OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["pico"]
    assert client.models.retrieve("pico").owned_by == "cusprun"
    assert httpx2.get(f"{server.root}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert httpx2.get(f"{server.root}/openapi.json").json()["openapi"].startswith("3.1")


def test_metrics_count(client: OpenAI, server: Server) -> None:
    before = [server.metric(f"cusprun_{name}_total") for name in ("generated_tokens", "prompt_tokens", "requests")]
    usage = ask(client, max_tokens=7).usage
    after = [server.metric(f"cusprun_{name}_total") for name in ("generated_tokens", "prompt_tokens", "requests")]
    grown = [one - other for one, other in zip(after, before, strict=True)]
    assert grown == [7, usage.prompt_tokens, 1 + 3]  # the metrics' own requests, each before it is counted
    assert server.metric("process_resident_memory_bytes") > 1e7
    assert server.metric("cusprun_running") == server.metric("cusprun_waiting") == 0


def test_the_answer_does_not_depend_on_what_came_before(client: OpenAI) -> None:
    """Prefixes are reused, and the probabilities stay the same bit by bit."""
    long = "The tenant shall pay the rent on the first day of each month. " * 12

    def told(text: str) -> tuple[list[float], int]:
        found = ask(client, text, logprobs=True, max_tokens=12)
        cached = found.usage.prompt_tokens_details.cached_tokens
        return [entry.logprob for entry in found.choices[0].logprobs.content], cached

    first, _ = told(long + "Who pays?")
    told("Something else.")
    again, _ = told(long + "Who pays?")  # from the few tokens that every conversation begins with
    told(long + "And who does not? " * 3)
    warm, cached = told(long + "Who pays?")
    assert cached >= 128
    assert first == again == warm


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"max_tokens": 301}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"n": 9}, 400, "n"),
        ({"top_logprobs": 2}, 400, None),
        ({"stream_options": {"include_usage": True}}, 400, None),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"messages": [{"role": "user", "content": "rent " * 600}]}, 400, "messages"),
    ],
)
def test_requests_that_make_no_sense(server: Server, change: dict[str, Any], status: int, param: str | None) -> None:
    found = server.post("chat/completions", **{"messages": [{"role": "user", "content": "Hi"}], **change})
    error = found.json()["error"]
    assert found.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["param"] or "").startswith(param) if param else error["param"] is None


def test_the_client_raises_its_own_errors(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, but 'pico'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match="context 512"):
        ask(client, "rent " * 600)
    with pytest.raises(openai.BadRequestError, match="300 tokens at most"):
        ask(client, max_tokens=1000, stream=True)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[" * 10000, {}, 400),
        (b'{"model": "\xff"}', {}, 400),
        (b'{"model": "pico", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b'{"model": "pico", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
        (b" " * 20001, {}, 413),
        (b"{}", {"host": "rebound.example"}, 403),
        (b"{}", {"host": "rebound.example:80"}, 403),
    ],
)
def test_bodies_and_headers(server: Server, body: bytes, headers: dict[str, str], status: int) -> None:
    headers = {"content-type": "application/json", **headers}
    found = httpx2.post(f"{server.url}/chat/completions", content=body, headers=headers)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_bounded_too(server: Server) -> None:
    found = httpx2.post(
        f"{server.url}/completions", content=iter([b" " * 9000] * 3), headers={"content-type": "application/json"}
    )
    assert found.status_code == 413


def test_addresses_and_methods(server: Server) -> None:
    assert httpx2.get(f"{server.root}/v1/nothing").status_code == 404
    assert httpx2.get(f"{server.root}/v1/models/").json()["error"]["code"] in (None, "model_not_found")
    found = httpx2.get(f"{server.url}/chat/completions")
    assert (found.status_code, found.headers["allow"]) == (405, "POST")
    assert found.json()["error"]["type"] == "invalid_request_error"
    for host in ("localhost:1", "127.0.0.1", "[::1]:8", "LOCALHOST"):
        assert httpx2.get(f"{server.root}/health", headers={"host": host}).status_code == 200


def test_web_pages_only_as_told(server: Server) -> None:
    def preflight(origin: str) -> httpx2.Response:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        return httpx2.options(f"{server.url}/chat/completions", headers={"origin": origin, **asked})

    assert preflight("https://page.example").headers["access-control-allow-origin"] == "https://page.example"
    assert preflight("https://other.example").status_code == 400
    found = httpx2.get(f"{server.url}/models", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in found.headers


def test_a_key(gguf: Path) -> None:
    with serving(
        gguf, "--host", "0.0.0.0", "--name", "mine", environment={"CUSPRUN_API_KEY": "a-secret-key"}
    ) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for key in ("a-secret-kez", "a-secret-key2", "a", "ä"):
            headers = {"authorization": f"Bearer {key}".encode("latin-1")}
            found = httpx2.get(f"{url}/models", headers=headers)
            assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx2.get(url.replace("/v1", "/metrics")).status_code == 401
        assert httpx2.get(url.replace("/v1", "/health")).status_code == 200
        with OpenAI(base_url=url, api_key="a-secret-key") as client:
            assert [model.id for model in client.models.list()] == ["mine"]
        with OpenAI(base_url=url, api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_settings_that_make_no_sense(gguf: Path, server: Server, tmp_path: Path) -> None:
    port = server.url.partition("://")[2].partition(":")[2].partition("/")[0]
    for options, words in (
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", "short"], "8 printable"),
        (["--cors", "example.org"], "https://example.org"),
        (["--port", port], f"port {port} of 127.0.0.1 is taken"),
        (["--host", "192.0.2.1", "--api-key", "long-enough"], "cannot be listened on"),
        (["--max-body", "many"], "--max-body"),
        (["--grace", "inf"], "--grace inf: write a number of seconds, 0 or more"),
        (["--timeout", "inf"], "--timeout inf: write a number of seconds, 0.1 or more"),
    ):
        done = subprocess.run([*COMMAND, "serve", str(gguf), *options], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1.0])
def test_times_that_are_none(seconds: float) -> None:
    for flag, settings in (("timeout", Settings(timeout=seconds)), ("grace", Settings(grace=seconds))):
        with pytest.raises(InvalidRequest, match=f"--{flag} {seconds}: write a number of seconds"):
            settings.check()
    Settings(timeout=0.1, grace=0).check()


def test_an_onnx_folder(gguf: Path, tmp_path: Path) -> None:
    export_onnx(gguf.parent / "model", tmp_path / "onnx", "fp32")
    runtime = open_runtime(tmp_path / "onnx", threads=1)
    expected = answer_alone(runtime, QUESTION, MOST)
    runtime.close()
    with serving(tmp_path / "onnx", "--parallel", "2") as server, server.client() as client:
        found = client.chat.completions.create(
            model="onnx", messages=[{"role": "user", "content": QUESTION}], max_tokens=MOST
        )
        assert found.choices[0].message.content == expected
