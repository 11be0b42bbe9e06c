"""The OpenAPI 3.1 document, made from the same models that check the requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from cusprun import __version__
from cusprun.deploy.serve import replies
from cusprun.deploy.serve.errors import ErrorReply
from cusprun.deploy.serve.schemas import ChatRequest, CompletionRequest

REPLIES = (
    replies.ChatReply, replies.ChatChunk, replies.CompletionReply, replies.Models, replies.Model, replies.Health,
    ErrorReply,
)  # fmt: skip
WHAT = {
    400: "What was asked makes no sense.",
    401: "The key is missing or wrong.",
    403: "The Host header names another server.",
    404: "No such model or address.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full.",
    500: "The generation failed.",
    503: "The server is stopping, or gave no answer in time.",
}
GENERATING = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
READING = (401, 403, 503)


def describe(model: str) -> str:
    """The document for a server of ``model``, as JSON."""
    _, schemas = models_json_schema(
        [(one, "validation") for one in (ChatRequest, CompletionRequest, *REPLIES)],
        ref_template="#/components/schemas/{model}",
    )
    definitions = schemas["$defs"]
    for name in ("ChatRequest", "CompletionRequest"):
        definitions[name]["properties"]["model"]["enum"] = [model]
    health = {**_read("health", "Whether it takes requests.", "Health", stopping="Health"), "security": []}
    paths = {
        "/v1/chat/completions": {
            "post": _generate("createChatCompletion", "Answer a conversation.", "ChatRequest", "ChatReply", "ChatChunk")
        },
        "/v1/completions": {
            "post": _generate(
                "createCompletion", "Continue a text.", "CompletionRequest", "CompletionReply", "CompletionReply"
            )
        },
        "/v1/models": {"get": _read("listModels", "What is served.", "Models")},
        "/v1/models/{model}": {
            "get": {
                **_read("retrieveModel", "One model.", "Model", (404,)),
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1},
                     "example": model},
                ],
            }
        },
        "/health": {"get": health},
        "/metrics": {"get": _read("metrics", "Figures in Prometheus' text format.", None)},
        "/openapi.json": {"get": _read("describe", "This document.", {"type": "object"})},
    }  # fmt: skip
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "cusprun-edge serve",
            "version": __version__,
            "description": f"OpenAI's interface to {model}.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # none is needed where the server was started without a key
    }
    return json.dumps(document, ensure_ascii=False)


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in statuses:
        found[str(status)] = {"description": WHAT[status], "content": _json(_ref("ErrorReply"))}
        if status in (429, 503):
            found[str(status)]["headers"] = {
                "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
            }
    return found


def _generate(name: str, summary: str, request: str, reply: str, chunk: str) -> dict[str, Any]:
    document = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(chunk)}
    event = {"type": "object", "properties": {"data": {"anyOf": [document, {"const": "[DONE]"}]}}, "required": ["data"]}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(request))},
        "responses": {
            "200": {
                "description": "The answer; by events where stream is true.",
                "content": {**_json(_ref(reply)), "text/event-stream": {"schema": event}},
            },
            **_errors(GENERATING),
        },
    }


def _read(
    name: str,
    summary: str,
    reply: str | dict[str, str] | None,
    more: Sequence[int] = (),
    stopping: str = "ErrorReply",
) -> dict[str, Any]:
    if reply is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = _json(_ref(reply) if isinstance(reply, str) else reply)
    errors = _errors((*READING, *more))
    errors["503"]["content"] = _json(_ref(stopping))
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "It.", "content": content}, **errors},
    }
