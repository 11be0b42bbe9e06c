"""What `serve` does when it has too much to do, when clients leave, and when it is told to stop."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from cusprun.deploy.serve.app import ARRIVING
from cusprun.runtimes import open_runtime
from tests.deploy.serving import Server, answer_alone, serving, small_gguf

CONTEXT = 16384
LONG = 12000  # tokens that take many seconds
CLIENTS = 64
QUESTION = "Wer zahlt die Miete?"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_gguf(tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that would write for half a minute."""
    folder = tmp_path_factory.mktemp("slow")
    return small_gguf(folder, num_hidden_layers=12, intermediate_size=512, max_position_embeddings=CONTEXT)


def serving_slowly(slow: Path, *options: str) -> Any:
    return serving(slow, "--context", str(CONTEXT), "--max-tokens", str(LONG), *options)


@pytest.fixture(scope="module")
def server(slow: Path) -> Iterator[Server]:
    with serving_slowly(slow, "--queue", "2") as found:
        yield found


def stream(client: OpenAI, tokens: int = LONG) -> Any:
    """A stream whose first text is there."""
    found = client.completions.create(model="pico", prompt="Le", max_tokens=tokens, stream=True)
    next(iter(found))
    return found


def seconds_until_idle(server: Server) -> float:
    begun = time.monotonic()
    while httpx2.get(f"{server.root}/health").json()["running"]:
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    return time.monotonic() - begun


def in_background(function: Any, *arguments: Any, **named: Any) -> tuple[threading.Thread, list[Any]]:
    """A call in a thread, and a list that gets what it returns or raises."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(function(*arguments, **named))
        except Exception as error:  # the test looks at it
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, found


def wait_for(server: Server, running: int, waiting: int) -> None:
    end = time.monotonic() + 30
    while httpx2.get(f"{server.root}/health").json() != {"status": "ok", "running": running, "waiting": waiting}:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["stream", "whole", "prompt"])
def test_a_client_that_leaves_frees_the_model(server: Server, how: str) -> None:
    before, tokens = server.metric("cusprun_cancelled_total"), server.metric("cusprun_generated_tokens_total")
    if how == "stream":
        with server.client() as client:
            stream(client).close()
    else:
        connection = http.client.HTTPConnection("127.0.0.1", int(server.root.rpartition(":")[2]))
        # The long prompt takes longer than its first pieces: what is cancelled then has not said a word.
        prompt = "Le" if how == "whole" else "rent " * 7000
        body = json.dumps({"model": "pico", "prompt": prompt, "max_tokens": LONG if how == "whole" else 1})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_for(server, running=1, waiting=0)
        connection.close()
    assert seconds_until_idle(server) < 3
    assert server.metric("cusprun_cancelled_total") == before + 1
    assert server.metric("cusprun_generated_tokens_total") - tokens < LONG / 2
    assert server.post("completions", prompt="Le", max_tokens=3).status_code == 200


def test_a_client_that_leaves_the_queue(server: Server) -> None:
    before = server.metric("cusprun_cancelled_total")
    with server.client() as client:
        running = stream(client)
        connection = http.client.HTTPConnection("127.0.0.1", int(server.root.rpartition(":")[2]))
        body = json.dumps({"model": "pico", "prompt": "Le", "max_tokens": 5})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_for(server, running=1, waiting=1)
        connection.close()
        wait_for(server, running=1, waiting=0)
        assert server.metric("cusprun_cancelled_total") == before + 1
        running.close()
    seconds_until_idle(server)


def test_a_full_queue(server: Server) -> None:
    """One runs, two wait, the next is told when to come back; those that wait are answered in their order."""
    order: list[int] = []

    def ask(number: int) -> None:
        most = 2 if number == 0 else 300  # so that the second cannot overtake on its way back
        assert server.post("completions", prompt="Le", max_tokens=most).status_code == 200
        order.append(number)

    with server.client() as client:
        running = stream(client)
        threads = []
        for number in range(2):
            threads.append(in_background(ask, number)[0])
            wait_for(server, running=1, waiting=number + 1)
        refused = server.post("completions", prompt="Le", max_tokens=2)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="pico", prompt="Le")
        running.close()
    for thread in threads:
        thread.join(60)
    assert order == [0, 1]


def test_a_request_that_takes_too_long(slow: Path) -> None:
    with serving_slowly(slow, "--timeout", "0.7") as server, server.client() as client:
        begun = time.monotonic()
        found = client.completions.create(model="pico", prompt="Le", max_tokens=LONG)
        assert found.choices[0].finish_reason == "length"  # cut, and what there is is given
        assert 0 < found.usage.completion_tokens < LONG
        late = server.post("completions", prompt="rent " * 7000, max_tokens=2)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        assert int(late.headers["retry-after"]) >= 1
        with closing(half_sent(server)) as connection:
            assert connection.getresponse().status == 408
        assert time.monotonic() - begun < 20


def test_answers_that_are_there_when_the_time_is_up_are_given(slow: Path) -> None:
    with serving_slowly(slow, "--timeout", "0.7") as server, server.client() as client:
        for asked in ({"prompt": "Le", "n": 3}, {"prompt": ["Le", "rent " * 7000, "Le"]}):
            found = client.completions.create(model="pico", max_tokens=LONG, **asked)
            assert [choice.finish_reason for choice in found.choices] == ["length"] * 3
            assert [choice.text != "" for choice in found.choices] == [True, False, False]
            assert 0 < found.usage.completion_tokens < LONG
            chunks = list(client.completions.create(model="pico", max_tokens=LONG, stream=True, **asked))
            ends = [(choice.index, choice.finish_reason) for chunk in chunks for choice in chunk.choices]
            assert [end for end in ends if end[1]] == [(0, "length"), (1, "length"), (2, "length")]


def half_sent(server: Server) -> http.client.HTTPConnection:
    """A request whose body does not come."""
    connection = http.client.HTTPConnection("127.0.0.1", int(server.root.rpartition(":")[2]), timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "100")
    connection.endheaders(b'{"model"')
    return connection


def test_bodies_that_do_not_come_are_bounded(gguf: Path) -> None:
    with serving(gguf, "--queue", "0") as server:
        connections = [half_sent(server) for _ in range(1 + ARRIVING)]
        until = time.monotonic() + 30
        while (refused := server.post("completions", prompt="Le", max_tokens=1)).status_code != 429:
            assert time.monotonic() < until
        assert int(refused.headers["retry-after"]) >= 1
        for connection in connections:
            connection.close()
        while server.post("completions", prompt="Le", max_tokens=1).status_code != 200:
            assert time.monotonic() < until


def test_two_answers_at_once(slow: Path) -> None:
    with serving_slowly(slow, "--parallel", "2", "--queue", "0") as server, server.client() as client:
        first, second = stream(client), stream(client)
        assert server.metric("cusprun_running") == 2
        assert server.post("completions", prompt="Le", max_tokens=2).status_code == 429
        second.close()
        wait_for(server, running=1, waiting=0)
        assert server.post("completions", prompt="Le", max_tokens=2).status_code == 200
        first.close()


def test_stopping_lets_the_running_answer_end(slow: Path) -> None:
    with serving_slowly(slow) as server, server.client() as client:
        thread, answers = in_background(
            client.completions.create, model="pico", prompt="Le", max_tokens=1500, timeout=60
        )
        wait_for(server, running=1, waiting=0)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while (refused := server.post("completions", prompt="Le")).status_code != 503:
            assert time.monotonic() < until
        assert refused.json()["error"]["code"] == "stopping"
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx2.get(f"{server.root}/health").json()["status"] == "stopping"
        assert server.process.wait(60) == 0
        thread.join(60)
        assert answers[0].usage.completion_tokens == 1500, answers


def test_stopping_cuts_what_outlives_the_grace(slow: Path) -> None:
    with serving_slowly(slow, "--grace", "0.3") as server, server.client() as client:
        running = stream(client)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="stopping"):
            list(running)
        assert server.process.wait(60) == 0
        assert time.monotonic() - begun < 10


def test_a_second_signal_ends_at_once(slow: Path) -> None:
    with serving_slowly(slow) as server, server.client() as client:
        stream(client)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM


def test_an_idle_server_ends_at_once(gguf: Path) -> None:
    with serving(gguf) as server, server.client() as client:
        client.models.list()  # a connection that is kept
        begun = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begun < 5


def test_64_clients_get_their_own_answers(gguf: Path) -> None:
    """Every answer is the one given alone; the rest is told to come back."""
    runtime = open_runtime(gguf, context=512, threads=1)
    questions = [f"{number} {words}" for number in range(16) for words in (QUESTION, "Who pays?")]
    expected = {question: answer_alone(runtime, question, 16) for question in questions}
    runtime.close()
    assert len(set(expected.values())) > 16
    seen: Counter[str] = Counter()

    async def work(client: AsyncOpenAI, number: int, until: float) -> None:
        turn = number
        while time.monotonic() < until:
            turn += 7
            question = questions[turn % len(questions)]
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "max_tokens": 16}
            try:
                if turn % 2:
                    found = await client.chat.completions.create(model="pico", **asked)
                    text = found.choices[0].message.content
                else:
                    chunks = await client.chat.completions.create(model="pico", stream=True, **asked)
                    text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
                seen["right" if text == expected[question] else "wrong"] += 1
            except openai.RateLimitError as error:
                seen["refused" if int(error.response.headers["retry-after"]) >= 1 else "wrong"] += 1
                await asyncio.sleep(0.2)

    async def all_clients(url: str) -> None:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            until = time.monotonic() + 4
            await asyncio.gather(*(work(client, number, until) for number in range(CLIENTS)))

    with serving(gguf, "--queue", "16") as server:
        asyncio.run(all_clients(server.url))
        text = httpx2.get(f"{server.root}/metrics").text
        counted = {
            status: float(value)
            for status, value in re.findall(
                r'requests_total{endpoint="/v1/chat/completions",status="(\d+)"} (\S+)', text
            )
        }
    assert seen["wrong"] == 0
    assert seen["right"] > CLIENTS
    assert seen["refused"] > 0
    assert counted == {"200": seen["right"], "429": seen["refused"]}
