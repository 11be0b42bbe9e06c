"""One generation over HTTP: it waits for the engine, passes the events on, and gives up when the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cusprun.deploy.serve.engine import Busy, Engine, Stopping
from cusprun.deploy.serve.errors import ApiError
from cusprun.deploy.serve.forms import Form, Written
from cusprun.deploy.serve.job import Broken, Done, End, Event, Job, Piece
from cusprun.deploy.serve.settings import Settings

T = TypeVar("T")

CLIENT_LEFT = 499  # nobody reads it; what it is counted as


async def answer(request: Request, engine: Engine, settings: Settings, job: Job, form: Form, stream: bool) -> Response:
    """Generates and returns the response; raises ApiError where there is none to give."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()
    try:
        ticket = engine.submit(job, lambda event: _hand_over(loop, events, event), settings.timeout)
    except Busy as busy:
        raise ApiError(
            429,
            f"{settings.queue} requests are waiting already: try again in {busy.seconds:.0f} s",
            code="queue_full",
            retry_after=busy.seconds,
        ) from busy
    except Stopping as stopping:
        raise stopped(settings) from stopping
    streaming = False
    try:
        if not stream:
            found = await _unless_gone(request, _collect(events, engine, job, form, settings))
            return Response(found, media_type="application/json") if found is not None else Response(None, CLIENT_LEFT)
        first = await _unless_gone(request, _next(events, engine, settings))
        if first is None:
            return Response(None, CLIENT_LEFT)
        streaming = True
        return _Stream(_stream(first, events, engine, job, form, settings), lambda: engine.cancel(ticket))
    finally:
        if not streaming:
            engine.cancel(ticket)


def stopped(settings: Settings) -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=settings.grace)


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


async def _next(events: asyncio.Queue[Event], engine: Engine, settings: Settings) -> Event:
    event = await events.get()
    if isinstance(event, Broken):
        if event.reason == "timeout":
            raise ApiError(503, f"no answer within {settings.timeout:g} s", code="timeout", retry_after=engine.patience)
        if event.reason == "stopping":
            raise stopped(settings)
        raise ApiError(500, "the generation failed: the server's log says why")
    return event


async def _collect(events: asyncio.Queue[Event], engine: Engine, job: Job, form: Form, settings: Settings) -> str:
    written = [Written() for _ in range(len(job.prompts) * job.choices)]
    while True:
        match await _next(events, engine, settings):
            case Piece(index, text, scored):
                written[index].text += text
                written[index].scored += scored
            case End(index, reason):
                written[index].reason = reason
            case Done() as done:
                return form.whole(written, done)


async def _stream(
    event: Event, events: asyncio.Queue[Event], engine: Engine, job: Job, form: Form, settings: Settings
) -> AsyncIterator[str]:
    for index in range(len(job.prompts) * job.choices):
        if (opening := form.begin(index)) is not None:
            yield _sent(opening)
    try:
        while True:
            match event:
                case Piece():
                    yield _sent(form.piece(event))
                case End():
                    yield _sent(form.end(event))
                case Done():
                    if (usage := form.usage(event)) is not None:
                        yield _sent(usage)
                    break
            event = await _next(events, engine, settings)
    except ApiError as error:  # the status is out already
        yield _sent(error.reply.model_dump_json())
        return
    yield _sent("[DONE]")


def _sent(document: str) -> str:
    return f"data: {document}\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends them, ``done`` is called."""

    def __init__(self, chunks: AsyncIterator[str], done: Callable[[], None]) -> None:
        # no-transform and the X header keep proxies from gathering the pieces
        headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _unless_gone(request: Request, wanted: Coroutine[Any, Any, T]) -> T | None:
    """What ``wanted`` comes to, or None as soon as the client has left."""
    work, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
