"""What every request passes: the name it was sent to, the key, the refusal while stopping; and it is counted."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cusprun.deploy.serve.errors import ApiError
from cusprun.deploy.serve.metrics import Metrics
from cusprun.deploy.serve.settings import Settings, host_named

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json")
OPEN = "/health"  # answers without a key: whoever watches the service needs none


class Gate:
    """ASGI middleware; ``refuse`` returns the error for a path while the server is stopping, else None."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, refuse: Callable[[str], ApiError | None]
    ) -> None:
        self._app, self._metrics, self._refuse = app, metrics, refuse
        self._hosts = settings.hosts
        self._key = _digest(settings.api_key.encode()) if settings.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        endpoint = _endpoint(scope["path"])
        status = 499  # left before an answer began

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._problem(scope)
            if error is not None:
                await error.response()(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - begun)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and host_named(headers.get("host", "")) not in self._hosts:
            return ApiError(
                403,
                "the Host header names another server than this: call 127.0.0.1 or localhost, or start with "
                "--allow-host NAME",
                code="host_not_allowed",
            )
        if self._key is not None and scope["path"] != OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            # Digests are of one length: the time tells nothing of the key's, either.
            same = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key)
            if kind.lower() != "bearer" or not same:
                return ApiError(401, "send the key as Authorization: Bearer KEY", code="invalid_api_key")
        return self._refuse(scope["path"])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _endpoint(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ENDPOINTS else "other"
