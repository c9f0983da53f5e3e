"""The HTTP requests for work that are open: counted from their first byte to the last of their answers, and waited
for. Whoever only looks on is not."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["OpenRequests"]

WORK = frozenset({"/encode", "/send"})


class OpenRequests:
    """An ASGI app around another one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0
        self._none = asyncio.Event()
        self._none.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") not in WORK:
            await self._app(scope, receive, send)
            return
        self._open += 1
        self._none.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            if not self._open:
                self._none.set()

    async def until_none(self) -> None:
        await self._none.wait()
