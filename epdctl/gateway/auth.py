"""Who may speak to the gateway: those who show its key, where it has one. Health alone is open to all."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from epdctl.errors import RequestError
from epdctl.gateway.http import Body, Speaker
from epdctl.gateway.schema import error_body
from epdctl.ids import Secret
from epdctl.rank.web import HungUp

__all__ = ["KeyCheck", "shows_key"]

OPEN: Sequence[str] = ("/health",)


def shows_key(authorization: str, key: Secret) -> bool:
    """``Bearer KEY``; the comparison takes as long for a key that is nearly right as for any other."""
    scheme, _, shown = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), key.reveal().encode())


class KeyCheck:
    """ASGI middleware. A stranger's body is read on, and kept by nobody, before it is refused."""

    def __init__(self, app: ASGIApp, key: Secret, discard: int) -> None:
        self._app = app
        self._key = key
        self._discard = discard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = scope["type"] != "http" or scope["path"] in OPEN
        if known or shows_key(Headers(scope=scope).get("authorization", ""), self._key):
            await self._app(scope, receive, send)
            return
        refused = RequestError(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key")
        try:
            await Body(receive, self._discard).discard()
            body = error_body(refused).model_dump_json().encode()
            await Speaker(send).whole(refused.status, body, {"www-authenticate": "Bearer"})
        except HungUp:
            return
