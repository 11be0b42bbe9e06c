"""The endpoints: reads and checks a request, turns it into a job, and hands the engine's answer back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from cusprun.deploy.serve.answer import CLIENT_LEFT, answer, stopped
from cusprun.deploy.serve.engine import Engine
from cusprun.deploy.serve.errors import ApiError
from cusprun.deploy.serve.forms import ChatForm, CompletionForm
from cusprun.deploy.serve.gate import Gate
from cusprun.deploy.serve.job import Job
from cusprun.deploy.serve.metrics import MEDIA_TYPE, Metrics
from cusprun.deploy.serve.openapi import describe
from cusprun.deploy.serve.replies import Health, Model, Models
from cusprun.deploy.serve.schemas import ChatRequest, CompletionRequest, Generation
from cusprun.deploy.serve.settings import MOST_CHOICES, Settings
from cusprun.deploy.turns import Tokenizer, encode_turns
from cusprun.errors import InvalidRequest

ARRIVING = 64  # requests that are read and encoded beside those that wait and run
BODY_SECONDS = 30.0  # for a request's body to arrive
JSON = "application/json"

Wish = TypeVar("Wish", bound=BaseModel)
T = TypeVar("T")


class Api:
    """The endpoints of one server. ``tokenizer`` is called from one thread that is its own."""

    def __init__(
        self, settings: Settings, engine: Engine, tokenizer: Tokenizer, model: Model, n_vocab: int, metrics: Metrics
    ) -> None:
        self._settings, self._engine, self._metrics = settings, engine, metrics
        self._tokenizer, self._n_vocab, self._model = tokenizer, n_vocab, model
        self._encoder = ThreadPoolExecutor(1, "tokenizer")
        self._description = describe(model.id)
        self._inside = 0
        self.stopping = False

    def app(self) -> Starlette:
        """The ASGI application."""
        middleware = [Middleware(Gate, settings=self._settings, metrics=self._metrics, refuse=self._refuse)]
        if self._settings.origins:
            cors = Middleware(
                CORSMiddleware,
                allow_origins=list(self._settings.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["retry-after"],
            )
            middleware.insert(0, cors)
        app = Starlette(
            middleware=middleware,
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                ClientDisconnect: _client_left,
                Exception: _unforeseen,
            },
        )
        app.router = Router(
            [
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/openapi.json", self.openapi),
            ],
            redirect_slashes=False,
        )
        return app

    async def chat(self, request: Request) -> Response:
        async with self._admitted():
            return await self._chat(request)

    async def _chat(self, request: Request) -> Response:
        wish = await self._read(request, ChatRequest)
        tokens = await self._encode(lambda: [encode_turns(self._tokenizer, [turn.message() for turn in wish.messages])])
        job = self._job(wish, wish.most, wish.alternatives, tokens, "messages")
        form = ChatForm(self._model.id, job.alternatives is not None, wish.include_usage)
        return await answer(request, self._engine, self._settings, job, form, bool(wish.stream))

    async def complete(self, request: Request) -> Response:
        async with self._admitted():
            return await self._complete(request)

    async def _complete(self, request: Request) -> Response:
        wish = await self._read(request, CompletionRequest)
        tokens = await self._encode(lambda: self._prompts(wish))
        job = self._job(wish, wish.most, wish.alternatives, tokens, "prompt")
        form = CompletionForm(self._model.id, job.alternatives is not None, wish.include_usage)
        return await answer(request, self._engine, self._settings, job, form, bool(wish.stream))

    async def models(self, request: Request) -> Response:
        return _json(Models(data=[self._model]))

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._model)

    async def health(self, request: Request) -> Response:
        health = Health(
            status="stopping" if self.stopping else "ok", running=self._engine.running, waiting=self._engine.waiting
        )
        return _json(health, 503 if self.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": MEDIA_TYPE})

    async def openapi(self, request: Request) -> Response:
        return Response(self._description, media_type=JSON)

    def close(self) -> None:
        self._encoder.shutdown()

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Bounds the requests whose bodies are held, before there is a job that the queue could bound."""
        if self._inside >= self._settings.parallel + self._settings.queue + ARRIVING:
            raise ApiError(
                429, f"{self._inside} requests are here already", code="queue_full", retry_after=self._engine.patience
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def _refuse(self, path: str) -> ApiError | None:
        return stopped(self._settings) if self.stopping and path != "/health" else None

    async def _read(self, request: Request, kind: type[Wish]) -> Wish:
        """The request's body as ``kind``; raises ApiError where it is none."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != JSON or request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, f"send the request as {JSON}, not compressed", code="unsupported_media_type")
        seconds = min(BODY_SECONDS, self._settings.timeout)
        try:
            async with asyncio.timeout(seconds):
                body = await self._body(request)
        except TimeoutError as error:
            close = {"connection": "close"}
            raise ApiError(408, f"the request's body took longer than {seconds:g} s", headers=close) from error
        try:
            wish = kind.model_validate_json(body)
        except ValidationError as error:
            raise _invalid(error) from error
        if isinstance(wish, Generation):
            self._check_model(wish.model)
        return wish

    async def _body(self, request: Request) -> bytes:
        most = self._settings.max_body
        length = request.headers.get("content-length", "")
        body = bytearray()
        if not (length.isdecimal() and int(length) > most):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    break
            else:
                return bytes(body)
        problem = f"the request's body is larger than {most} bytes"
        raise ApiError(413, problem, code="body_too_large", headers={"connection": "close"})

    def _check_model(self, name: str) -> None:
        if name != self._model.id:
            raise ApiError(
                404, f"there is no model {name[:100]!r} here, but {self._model.id!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    async def _encode(self, encode: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except InvalidRequest as error:
            raise ApiError(400, str(error), param="messages") from error

    def _prompts(self, wish: CompletionRequest) -> list[list[int]]:
        if isinstance(wish.prompt, str):
            texts = [wish.prompt]
        elif all(isinstance(one, str) for one in wish.prompt):
            texts = [str(one) for one in wish.prompt]
        else:
            tokens = [int(one) for one in wish.prompt]
            if max(tokens) >= self._n_vocab:
                raise ApiError(400, f"token id {max(tokens)} is none of the {self._n_vocab}", param="prompt")
            return [tokens]
        bos = [] if self._tokenizer.bos is None else [self._tokenizer.bos]
        found = [bos + self._tokenizer.encode(text, special=True) for text in texts]
        if not all(found):
            raise ApiError(400, "the prompt is empty", param="prompt")
        return found

    def _job(
        self,
        wish: Generation,
        most: int | None,
        alternatives: int | None,
        prompts: Sequence[Sequence[int]],
        param: str,
    ) -> Job:
        limit = self._settings.max_tokens
        if most is not None and most > limit:
            raise ApiError(400, f"an answer has {limit} tokens at most here: ask for fewer", param="max_tokens")
        longest, context = max(map(len, prompts)), self._model.context_window
        if longest >= context:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens and the context {context}: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        choices = wish.n or 1
        if choices * len(prompts) > MOST_CHOICES:
            raise ApiError(400, f"{MOST_CHOICES} answers to a request at most: ask for fewer", param="n")
        if alternatives is not None and alternatives >= self._n_vocab:
            raise ApiError(400, f"the model has {self._n_vocab} tokens", param="logprobs")
        sampling = wish.sampling(most or limit, secrets.randbits(32))
        return Job(tuple(map(tuple, prompts)), sampling, wish.stops, choices, alternatives)


def _json(value: BaseModel, status: int = 200) -> Response:
    return Response(value.model_dump_json(), status, media_type=JSON)


def _invalid(error: ValidationError) -> ApiError:
    """The first problem that pydantic found, with the path of its field; names of types in the path are left out."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        reason = problem["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is no JSON: {reason}", code="invalid_json")
    path = [part for part in problem["loc"] if isinstance(part, int) or (part.isidentifier() and part not in UNION)]
    param = ".".join(map(str, path)) or None
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "this field is not known here, and would be ignored"
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


UNION = frozenset({"str", "int", "none"})  # what pydantic names the members of a union


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing here", 405: f"{request.method} is not for this address"}
    message = what.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(None, CLIENT_LEFT)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return ApiError(500, "an error of the server: its log says which").response()
