"""The HTTP API: OpenAI's completions and model list, health and metrics. Decides nothing about ranks."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epdctl.errors import RequestError
from epdctl.gateway.answer import Answer, Piece
from epdctl.gateway.aside import Aside
from epdctl.gateway.auth import KeyCheck
from epdctl.gateway.budget import Door, Ticket
from epdctl.gateway.detokenize import TextStream
from epdctl.gateway.forms import ChatForm, Form, TextForm
from epdctl.gateway.http import Body, Speaker, error_headers
from epdctl.gateway.intake import Intake, Order, remote_urls
from epdctl.gateway.openapi import description
from epdctl.gateway.pipeline import Pipeline, new_request_id
from epdctl.gateway.remote import Fetcher
from epdctl.gateway.schema import ChatRequest, TextRequest, error_body
from epdctl.ids import RequestId
from epdctl.rank.web import HungUp, unless_hung_up
from epdctl.telemetry.hops import Way
from epdctl.telemetry.metrics import CONTENT_TYPE, GatewayMeters
from epdctl.wire.config import GatewayConfig
from epdctl.wire.trace import Kind

__all__ = ["Desk", "create_app"]

log = logging.getLogger(__name__)

REQUEST_ID = "epdctl.request"  # in the ASGI scope
MOST_NOTES = 200  # names of fields, which clients choose
MOST_NAMED = 32  # in one header
HUNG_UP = 499  # only in the metrics: nobody is there to read a status
_CLIENT_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Desk:
    """Everything a request needs on its way through this process."""

    intake: Intake
    pipeline: Pipeline
    door: Door
    meters: GatewayMeters
    aside: Aside
    fetcher: Fetcher
    config: GatewayConfig
    rank_metrics: Callable[[], Awaitable[bytes]]  # of the whole cluster, in the exposition format


def create_app(desk: Desk) -> ASGIApp:
    app = FastAPI(title="epdctl", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_fault)
    notes = Notes()
    for api in (CHAT, TEXT):
        app.router.routes.append(Route(api.path, Completions(desk, api, notes), methods=["POST"]))
    _add_reports(app, desk)
    key = desk.config.api_key
    guarded = app if key is None else KeyCheck(app, key, desk.intake.limits.max_body_bytes)
    return _Envelope(guarded, desk.door)  # outermost: what the error handlers send passes through it too


def _add_reports(app: FastAPI, desk: Desk) -> None:
    card = {
        "id": desk.intake.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "epdctl",
        "max_model_len": desk.intake.limits.max_context,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        try:
            desk.intake.check_model(name)
        except RequestError as error:
            return _refusal(error, None)
        return JSONResponse(card)

    @app.get("/openapi.json")
    async def openapi() -> dict[str, Any]:
        return description(keyed=desk.config.api_key is not None)

    @app.get("/health")
    async def health() -> JSONResponse:
        ranks = desk.pipeline.ranks
        reasons = ranks.missing(media=ranks.sees)
        if desk.door.closed is not None:
            reasons.insert(0, desk.door.closed)
        status = "unavailable" if reasons else "ok"
        return JSONResponse({"status": status, "reasons": reasons}, status_code=503 if reasons else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.meters.text() + await desk.rank_metrics(), media_type=CONTENT_TYPE)


async def _http_error(_: Request, error: Exception) -> Response:
    """404 and 405, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    refused = RequestError(error.status_code, error.detail)
    return _refusal(refused, error.headers)


async def _our_fault(_: Request, error: Exception) -> Response:
    """The traceback goes to the log by way of the server."""
    return _refusal(_defect(error), None)


def _defect(error: Exception) -> RequestError:
    """The client learns only that it is not to blame."""
    return RequestError(500, f"a defect of the gateway: {type(error).__name__}; its log says more", code="internal")


def _refusal(error: RequestError, headers: Mapping[str, str] | None) -> JSONResponse:
    return JSONResponse(
        error_body(error).model_dump(), status_code=error.status, headers={**error_headers(error), **(headers or {})}
    )


class _Envelope:
    """ASGI middleware: a request id on every response, and the end of the connection while draining."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ours = scope[REQUEST_ID] = new_request_id((TEXT if scope["path"] == TEXT.path else CHAT).ids)
        theirs = Headers(scope=scope).get("x-request-id", "")
        shown = theirs if _CLIENT_ID.fullmatch(theirs) else ours
        if shown != ours:
            log.info("%s is called %s by its client", ours, shown)

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = shown
                if self._door.closed is not None:
                    headers["connection"] = "close"
            await send(message)

        await self._app(scope, receive, stamped)


@dataclass(slots=True)
class Visit:
    """One client's call, from its first byte on."""

    request: RequestId
    began: float  # on the pipeline's clock
    speaker: Speaker
    ticket: Ticket
    way: Way  # from its first byte to the last of its answer


@dataclass(frozen=True, slots=True)
class Api:
    """What chat and text completions differ in."""

    path: str
    request: type[ChatRequest] | type[TextRequest]
    form: type[ChatForm] | type[TextForm]
    ids: str  # what its requests' ids begin with


CHAT = Api("/v1/chat/completions", ChatRequest, ChatForm, "chatcmpl")
TEXT = Api("/v1/completions", TextRequest, TextForm, "cmpl")


class Notes:
    """Which ignored fields the log has told of: each is told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, ignored: Sequence[str]) -> None:
        fresh = [name for name in ignored if name not in self._told]
        if fresh and len(self._told) < MOST_NOTES:
            self._told.update(fresh)
            log.warning("clients send fields that change nothing here: %s", ", ".join(fresh))


class Completions:
    """ASGI endpoint. Every call gets exactly one answer and leaves nothing behind, however it ends."""

    def __init__(self, desk: Desk, api: Api, notes: Notes) -> None:
        self._desk = desk
        self._api = api
        self._notes = notes
        self._seconds = desk.intake.limits.request_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = self._desk.pipeline.now()
        speaker, body = Speaker(send), Body(receive, self._desk.intake.limits.max_body_bytes)
        status = 500
        way = self._desk.pipeline.hops.begin(Kind.REQUEST, scope[REQUEST_ID], "intake")
        try:
            ticket = self._desk.door.enter()
            try:
                status = await self._visit(Visit(scope[REQUEST_ID], began, speaker, ticket, way), receive, body)
            finally:
                ticket.give_back()
        except RequestError as error:
            status = await self._refuse(error, speaker, body)
        except HungUp:
            status = HUNG_UP
        except Exception as error:
            log.exception("%s met a defect", scope[REQUEST_ID])
            status = await self._refuse(_defect(error), speaker, body)
        finally:
            way.end()
            self._desk.meters.requests.labels(str(status)).inc()
            self._desk.meters.latency.observe(self._desk.pipeline.now() - began)

    async def _refuse(self, error: RequestError, speaker: Speaker, body: Body) -> int:
        try:
            await body.discard()
            await speaker.refuse(error)
        except HungUp:
            return HUNG_UP
        return error.status

    async def _visit(self, visit: Visit, receive: Receive, body: Body) -> int:
        await body.read(visit.ticket, self._seconds)
        await unless_hung_up(receive, self._serve(visit, body))
        return 200

    async def _serve(self, visit: Visit, body: Body) -> None:
        desk = self._desk
        request, order, ignored = await self._take_in(visit, body)
        for item in order.prompt.items:
            desk.meters.media.labels(item.modality.value).inc()
        headers = {}
        if ignored:
            self._notes.tell(ignored)
            headers["x-epdctl-ignored"] = ",".join(ignored)
        flight = desk.pipeline.start(visit.way, order, visit.began + self._seconds)
        text = TextStream(desk.intake.decode, request.stops, request.min_tokens or 0)
        answer = Answer(flight, text, request)
        form = self._api.form(answer, desk.intake.model, desk.intake.chat.spell)
        try:
            if request.stream:
                await self._stream(visit, answer, form, headers)
            else:
                await self._whole(visit, answer, form, headers)
        finally:
            flight.abandon()  # means nothing when it has ended
        desk.meters.prompt_tokens.inc(answer.usage.prompt_tokens)
        desk.meters.completion_tokens.inc(answer.usage.completion_tokens)

    async def _take_in(self, visit: Visit, body: Body) -> tuple[ChatRequest | TextRequest, Order, list[str]]:
        """What is kept of a body as long as its answer takes, and the names of what was ignored. Body and text of the
        request go when this returns: they are three times as large as the media in them."""
        intake, aside, raw = self._desk.intake, self._desk.aside, body.take()
        strict = self._desk.config.strict
        request = await aside.run(lambda: intake.read(self._api.request, raw, strict=strict), visit.ticket)
        fetched = await self._fetch(visit, request, len(raw))
        order = await aside.run(lambda: intake.order(request, fetched), visit.ticket)
        visit.ticket.hold(order.media_bytes)
        ignored = [_header_text(name) for name in request.ignored_fields[:MOST_NAMED]]
        return request.bare(), order, ignored

    async def _fetch(self, visit: Visit, request: ChatRequest | TextRequest, body: int) -> dict[str, bytes]:
        places = remote_urls(request)
        if not places:
            return {}
        return await self._desk.fetcher.fetch_all(places, lambda came: visit.ticket.hold(body + came))

    async def _whole(self, visit: Visit, answer: Answer, form: Form, headers: Mapping[str, str]) -> None:
        read: list[Piece] = []
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                if not read:
                    self._note_first(visit)
                read.append(piece)
        await visit.speaker.whole(200, form.whole(read).model_dump_json().encode(), headers)

    async def _stream(self, visit: Visit, answer: Answer, form: Form, headers: Mapping[str, str]) -> None:
        """Nothing is sent before the first token, so that an error until then has a status of its own."""
        hidden = None if answer.asked.include_usage else {"usage"}

        async def say(chunk: BaseModel | None) -> None:
            if chunk is not None:
                await visit.speaker.event(chunk.model_dump_json(exclude=hidden).encode())

        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                if not visit.speaker.begun:
                    self._note_first(visit)
                    await visit.speaker.begin(headers)
                    await say(form.first())
                if not form.says_nothing(piece):
                    await say(form.piece(piece))
        await say(form.last())
        if answer.asked.include_usage:
            await say(form.usage())
        await visit.speaker.event(b"[DONE]")
        await visit.speaker.end()

    def _note_first(self, visit: Visit) -> None:
        self._desk.meters.first_token.observe(self._desk.pipeline.now() - visit.began)


def _header_text(name: str) -> str:
    """Field names are the client's: nothing of them may end a header line."""
    return re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64]
