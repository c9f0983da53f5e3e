"""A service without a model, to measure the supervisor with: ready at once, idle, with a grandchild hard to kill."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from epdctl.rank.service import Progress, Pulse
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import Endpoints, Peer

__all__ = ["Idle"]

_LONG = "100000"  # seconds; nobody waits for it


class Idle:
    """Implements Service. Its grandchild leaves the session, as daemons of real libraries do."""

    def __init__(self, spec: RankSpec) -> None:
        self._grandchild: asyncio.subprocess.Process | None = None

    async def start(self, progress: Progress) -> Endpoints:
        self._grandchild = await asyncio.create_subprocess_exec("sleep", _LONG, start_new_session=True)
        return Endpoints()

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        """Nobody to talk to."""

    def pulse(self) -> Pulse:
        return Pulse()

    async def drain(self) -> None:
        """Nothing is ever in flight."""

    async def close(self) -> None:
        if self._grandchild is not None:
            self._grandchild.kill()
            await self._grandchild.wait()
