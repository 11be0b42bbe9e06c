"""Answers that say no, in the shape OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel
from starlette.responses import Response


class ErrorBody(BaseModel):
    """What went wrong, for a person and for a program."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every answer that is no success."""

    error: ErrorBody


TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Ends a request with a status and OpenAI's error object; ``retry_after`` in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        kind = TYPES.get(status, "invalid_request_error")
        self.reply = ErrorReply(error=ErrorBody(message=message, type=kind, param=param, code=code))

    def response(self) -> Response:
        return Response(self.reply.model_dump_json(), self.status, headers=self.headers, media_type="application/json")
