"""The API described for machines: OpenAPI 3.1, with the very models that requests are checked against. Pure."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from epdctl import __version__
from epdctl.gateway.replies import ChatResponse, TextResponse
from epdctl.gateway.schema import ChatRequest, ErrorBody, TextRequest

__all__ = ["description"]

_AT = "#/components/schemas/"
_ERRORS = ("400", "401", "404", "408", "413", "429", "500", "502", "503", "504")


def description(*, keyed: bool) -> dict[str, Any]:
    """``keyed``: the gateway asks for its key."""
    _, schemas = models_json_schema(
        [
            (ChatRequest, "validation"),
            (TextRequest, "validation"),
            (ChatResponse, "serialization"),
            (TextResponse, "serialization"),
            (ErrorBody, "serialization"),
        ],
        ref_template=_AT + "{model}",
    )
    error = {"description": "OpenAI's error shape.", "content": _json("ErrorBody")}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "epdctl", "version": __version__},
        "paths": {
            "/v1/chat/completions": _completion("ChatRequest", "ChatResponse", error),
            "/v1/completions": _completion("TextRequest", "TextResponse", error),
            "/v1/models": {"get": {"responses": {"200": {"description": "The one model that is served."}}}},
            "/v1/models/{name}": {
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
                "get": {"responses": {"200": {"description": "That model."}, "404": error}},
            },
            "/health": {
                "get": {"security": [], "responses": {"200": {"description": "ok"}, "503": {"description": "reasons"}}}
            },
        },
        "components": {"schemas": schemas["$defs"]},
    }
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _completion(asked: str, answered: str, error: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "application/json": {"schema": {"$ref": _AT + answered}},
        "text/event-stream": {"schema": {"type": "string", "description": "With stream: true."}},
    }
    return {
        "post": {
            "requestBody": {"required": True, "content": _json(asked)},
            "responses": {"200": {"description": "The answer.", "content": answer}} | dict.fromkeys(_ERRORS, error),
        }
    }


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _AT + model}}}
