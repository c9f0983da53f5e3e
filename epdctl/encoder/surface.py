"""The encoder's own HTTP surface, on its router: for those who run the encoder alone behind another engine.

Decides nothing about ranks and imports no torch: a request becomes items for the router's inbox.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.routing import Route

from epdctl.encoder.canary import family_canary
from epdctl.encoder.dispatch import Ended, RankKey
from epdctl.encoder.errands import Errands
from epdctl.encoder.jobs import Jobs
from epdctl.encoder.orders import EncodeBody, SendBody, parse
from epdctl.encoder.profiles import Profiles
from epdctl.encoder.proof import Prober
from epdctl.encoder.requests import OpenRequests
from epdctl.encoder.verdict import Roster, Verdict, judge
from epdctl.errors import LoadError, RequestError
from epdctl.families import open_family
from epdctl.families.base import Span
from epdctl.ids import RankName
from epdctl.rank.media import Medium, Source, invalid, read, span_of
from epdctl.rank.web import HttpServer, HungUp, address_of, bind, unless_hung_up
from epdctl.telemetry.encoder import EncoderMeters
from epdctl.telemetry.metrics import CONTENT_TYPE
from epdctl.wire.config import EncoderHttp, RankSpec
from epdctl.wire.encode import ItemEncoded, MediaItem, Profiled, Prove, Proved, StartProfile, StopProfile

__all__ = ["Fleet", "HttpSurface"]

log = logging.getLogger(__name__)

BODY_SECONDS = 60.0
THREADS = 2  # for what would hold up the router's loop: parsing, base64, headers of media

Handler = Callable[[Request], Awaitable[Response]]
Items = list[tuple[MediaItem, bytes]]


class Fleet(Protocol):
    """What the surface asks of the router."""

    def ranks(self) -> list[tuple[RankKey, int]]: ...

    def open_ranks(self) -> list[RankKey]: ...

    def roster(self) -> Roster: ...

    @property
    def waiting(self) -> int: ...

    @property
    def dropped(self) -> Mapping[str, int]: ...

    def tell(self, rank: RankKey, message: StartProfile | StopProfile | Prove) -> None: ...


class HttpSurface:
    """Implements router.Surface. Raises LoadError for a token or a checkpoint that cannot be read, OSError for a port
    that is taken."""

    def __init__(self, spec: RankSpec, fleet: Fleet, inbox: str) -> None:
        http = spec.config.encoder.http
        assert http is not None, "made only where it was asked for"
        self._http = http
        self._limits = spec.config.limits
        self._fleet = fleet
        self._planned = spec.config.encoder.ranks
        self._family = open_family(Path(spec.config.model.path))
        self._token = _read_token(http)
        self._jobs = Jobs(inbox, http.held_bytes)
        self._errands = Errands(self._jobs)
        canary, seconds = family_canary(self._family), spec.config.encoder.canary_deadline
        self._prober = Prober(fleet, self._jobs, canary, seconds)
        self._profiles = Profiles(fleet, http.profiles)
        self._pool = ThreadPoolExecutor(THREADS, "intake")
        self._body_bytes = 0
        self._meters = EncoderMeters(
            pending=lambda: {str(key.rank): pending for key, pending in fleet.ranks()},
            waiting=lambda: fleet.waiting,
            held=lambda: self._jobs.account.held,
            dropped=lambda: fleet.dropped,
        )
        self._listener = bind(http.host, http.port)
        self._requests = OpenRequests(self._app())
        self._server = HttpServer(self._requests, self._listener)
        self._draining = False

    @property
    def url(self) -> str:
        return address_of(self._listener)

    async def start(self) -> None:
        await self._server.start()

    def stop_listening(self) -> None:
        """What is open goes on; what still comes over connections that are there is refused."""
        self._draining = True
        self._server.stop_listening()

    async def until_idle(self) -> None:
        await self._requests.until_none()

    async def close(self) -> None:
        await self._server.close()
        await self._prober.close()
        self._errands.close()
        self._jobs.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- what the router tells --

    def encoded(self, by: RankName, message: ItemEncoded) -> None:
        self._meters.sources.labels(by, message.source.value).inc()
        self._meters.cache_bytes.labels(by).set(message.cache_bytes)
        self._prober.encoded(by, message)

    def ended(self, end: Ended) -> None:
        self._meters.items.labels(end.state.value if end.kind is None else end.kind.value).inc()

    def profiled(self, by: RankName, message: Profiled) -> None:
        self._profiles.written(by, message)

    def proved(self, by: RankKey, message: Proved) -> None:
        self._prober.proved(by, message)

    def ranks_changed(self) -> None:
        self._prober.ranks_changed()
        self._profiles.ranks_changed()

    # -- the app --

    def _app(self) -> FastAPI:
        app = FastAPI(title="epdctl encoder", docs_url=None, redoc_url=None, openapi_url=None)
        routes: list[tuple[str, list[str], Handler]] = [
            ("/encode", ["POST"], self._encode),
            ("/send", ["POST"], self._send),
            ("/health", ["GET"], self._health),
            ("/health_generate", ["GET"], self._health_generate),
            ("/start_profile", ["POST"], self._start_profile),
            ("/stop_profile", ["POST"], self._stop_profile),
            ("/metrics", ["GET"], self._metrics),
        ]
        for path, methods, handler in routes:
            app.router.routes.append(Route(path, self._guarded(path, handler), methods=methods))
        return app

    def _guarded(self, path: str, handler: Handler) -> Handler:
        """Every request shows the token, and ends as an answer, whatever happens."""

        async def guarded(request: Request) -> Response:
            response = await self._answered(request, handler)
            self._meters.requests.labels(path, str(response.status_code)).inc()
            return response

        return guarded

    async def _answered(self, request: Request, handler: Handler) -> Response:
        try:
            self._check_token(request)
            self._check_open(request)
            return await handler(request)
        except RequestError as error:
            return _refusal(error)
        except HungUp:
            return Response(status_code=499)  # nobody reads it; the metrics do
        except Exception:
            log.exception("a request met a defect")
            return _refusal(RequestError(500, "a defect of the encoder; its router's log says more", code="internal"))

    def _check_token(self, request: Request) -> None:
        shown = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            raise RequestError(401, "show the token: Authorization: Bearer …", code="unauthorized")

    def _check_open(self, request: Request) -> None:
        if self._draining and (request.method == "POST" or request.url.path == "/health_generate"):
            raise RequestError(503, "the encoder is being stopped", code="draining", retry_after=1)

    async def _encode(self, request: Request) -> Response:
        raw = await self._body(request)
        try:
            loop = asyncio.get_running_loop()
            body, items = await loop.run_in_executor(self._pool, self._read, raw)
        finally:
            self._body_bytes -= len(raw)
        work = self._errands.encode(body, items, self._budget(body), anywhere=self._token is not None)
        return await unless_hung_up(request.receive, work)

    async def _send(self, request: Request) -> Response:
        raw = await self._body(request)
        self._body_bytes -= len(raw)
        body = parse(raw, SendBody)
        work = self._errands.send(body, self._budget(body), anywhere=self._token is not None)
        return await unless_hung_up(request.receive, work)

    def _budget(self, body: EncodeBody | SendBody) -> float:
        longest = self._limits.request_seconds
        return longest if body.budget_s is None else min(body.budget_s, longest)

    async def _body(self, request: Request) -> bytes:
        """The whole body, counted in ``_body_bytes`` until it is read. Raises RequestError (408, 413, 429)."""
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    self._body_bytes += len(chunk)
                    self._check_size(size)
                    chunks.append(chunk)
        except BaseException as error:
            self._body_bytes -= size
            if isinstance(error, TimeoutError):
                raise RequestError(408, "the body did not arrive in time", code="timeout") from error
            raise
        return b"".join(chunks)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            raise RequestError(413, f"the body is larger than {self._limits.max_body_bytes} bytes", code="too_large")
        if self._body_bytes > self._limits.media_bytes:
            raise RequestError(429, "too many bodies are being read", code="full", retry_after=1)

    def _read(self, raw: bytes) -> tuple[EncodeBody, Items]:
        """On a thread. Raises RequestError."""
        body = parse(raw, EncodeBody)
        if body.kind not in self._family.modalities:
            why = self._family.obstacle(body.kind) or f"this model takes {', '.join(self._family.modalities)}"
            text = f"modality {body.kind} is not served: {why}"
            raise RequestError(400, text, param="modality", code="unsupported_modality")
        of = len(body.mm_items)
        if of > self._limits.max_media:
            text = f"{of} items; at most {self._limits.max_media} are served"
            raise RequestError(400, text, param="mm_items")
        sources = [Source(body.kind, f"mm_items[{at}]", url) for at, url in enumerate(body.mm_items)]
        media = [read(source, self._limits) for source in sources]
        spans = [span_of(self._family, *each, of) for each in zip(sources, (m.header for m in media), strict=True)]
        self._check_rows(sources, spans)
        items = [_item(at, medium, spans[at], of) for at, medium in enumerate(media)]
        return body, [(item, medium.data) for item, medium in zip(items, media, strict=True)]

    def _check_rows(self, sources: Sequence[Source], spans: Sequence[Span]) -> None:
        """What no prompt has room for is not encoded: a long video would be gigabytes."""
        for source, span in zip(sources, spans, strict=True):
            if span.rows > self._limits.max_context:
                raise invalid(source, f"it makes {span.rows} rows; limits.max_context is {self._limits.max_context}")

    async def _health(self, _: Request) -> Response:
        """Answers at once, from what is known: it waits for no rank."""
        verdict = self._verdict()
        return JSONResponse(verdict.as_json(), status_code=verdict.status)

    def _verdict(self, faults: Mapping[RankName, str] | None = None) -> Verdict:
        return judge(self._planned, self._fleet.roster(), strict=self._http.strict, faults=faults)

    async def _health_generate(self, request: Request) -> Response:
        if (verdict := self._verdict()).status != 200:
            return JSONResponse(verdict.as_json(), status_code=verdict.status)
        outcome = await unless_hung_up(request.receive, self._prober.outcome())
        verdict = self._verdict(outcome.faults)
        body = {**verdict.as_json(), "encode": outcome.encode, "proofs": dict(outcome.ranks)}
        if outcome.broken:
            return JSONResponse({**body, "status": "unhealthy"}, status_code=503)
        return JSONResponse(body, status_code=verdict.status)

    async def _start_profile(self, request: Request) -> Response:
        raw = await self._body(request)
        self._body_bytes -= len(raw)
        return JSONResponse(self._profiles.start(raw))

    async def _stop_profile(self, _: Request) -> Response:
        results, fine = await self._profiles.stop()
        return JSONResponse(results, status_code=200 if fine else 500)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._meters.text(), media_type=CONTENT_TYPE)


def _item(index: int, medium: Medium, span: Span, of: int) -> MediaItem:
    return MediaItem(
        index=index,
        modality=span.modality,
        content_hash=medium.content_hash,
        of=of,
        grid=list(span.grid),
        rows=span.rows,
    )


def _read_token(http: EncoderHttp) -> str | None:
    if http.token_file is None:
        return None
    try:
        token = Path(http.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"the token file {http.token_file} cannot be read: {error}") from error
    if not token:
        raise LoadError(f"the token file {http.token_file} is empty")
    return token


def _refusal(error: RequestError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    body = {"status": "error", "message": error.message, "code": error.code, "param": error.param}
    return JSONResponse(body, status_code=error.status, headers=headers)
