"""``/start_profile`` and ``/stop_profile``: one recording on every rank, and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from epdctl.encoder.dispatch import RankKey
from epdctl.errors import RequestError
from epdctl.ids import RankName
from epdctl.wire.encode import Profiled, StartProfile, StopProfile

__all__ = ["Profiles"]

WRITE_SECONDS = 60.0  # for a trace to be written


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    num_steps: Annotated[int, msgspec.Meta(ge=1)] | None = None  # batches; None: until /stop_profile


class _Fleet(Protocol):
    def ranks(self) -> list[tuple[RankKey, int]]: ...

    def tell(self, rank: RankKey, message: StartProfile | StopProfile) -> None: ...


class Profiles:
    """One at a time. ``directory``: where traces go, the same for every rank of this host."""

    def __init__(
        self,
        fleet: _Fleet,
        directory: str | None,
        *,
        clock: Callable[[], float] = time.time,
        seconds: float = WRITE_SECONDS,
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._clock = clock
        self._seconds = seconds
        self._open: dict[RankKey, str] = {}
        self._written: dict[RankName, Profiled] = {}
        self._stopping = False
        self._changed = asyncio.Event()

    def start(self, raw: bytes) -> dict[str, object]:
        """Raises RequestError (400, 503)."""
        steps = self._parsed(raw).num_steps
        if self._directory is None:
            raise RequestError(400, "no place for traces: write stages.encoder.http.profiles", code="no_place")
        if self._open:
            raise RequestError(400, "a profile is already running: stop it first", code="running")
        ranks = [key for key, _ in self._fleet.ranks()]
        if not ranks:
            raise RequestError(503, "no rank is there that could be recorded", code="no_rank", retry_after=1)
        stamp = int(self._clock() * 1000)
        self._written.clear()
        for key in ranks:
            path = Path(self._directory) / f"{key.rank.file_stem}.{key.incarnation}.{stamp}.trace.json"
            self._open[key] = str(path)
            self._fleet.tell(key, StartProfile(path=str(path), steps=steps))
        return {"profiles": [{"rank": str(key.rank), "path": path} for key, path in self._open.items()]}

    def _parsed(self, raw: bytes) -> _Body:
        try:
            return msgspec.json.decode(raw, type=_Body) if raw.strip() else _Body()
        except msgspec.DecodeError as error:
            raise RequestError(400, f"the body is not as it should be: {error}", code="invalid_body") from error

    def written(self, by: RankName, message: Profiled) -> None:
        if message.path in self._open.values():
            self._written[by] = message
            self._changed.set()

    def ranks_changed(self) -> None:
        self._changed.set()

    async def stop(self) -> tuple[dict[str, object], bool]:
        """What became of each trace, and whether all of them are there. Raises RequestError (400, 409)."""
        if not self._open:
            raise RequestError(400, "no profile is running", code="not_running")
        if self._stopping:
            raise RequestError(409, "somebody else is stopping it already", code="stopping")
        self._stopping = True
        try:
            await self._end_all()
            results = [self._result(key, path) for key, path in self._open.items()]
        finally:
            self._stopping = False
            self._open.clear()
        return {"profiles": results}, all(result["error"] is None for result in results)

    async def _end_all(self) -> None:
        for key in self._open:
            self._fleet.tell(key, StopProfile())
        with contextlib.suppress(TimeoutError):  # it is told of each rank
            async with asyncio.timeout(self._seconds):
                while not self._complete():
                    self._changed.clear()
                    await self._changed.wait()

    def _complete(self) -> bool:
        """A rank that died meanwhile writes nothing any more."""
        there = {key for key, _ in self._fleet.ranks()}
        return all(key.rank in self._written or key not in there for key in self._open)

    def _result(self, key: RankKey, path: str) -> dict[str, str | None]:
        told = self._written.get(key.rank)
        error = "nothing was heard of its trace" if told is None else told.error
        note = None if told is None else told.note
        there = path if error is None and note is None else None
        return {"rank": str(key.rank), "path": there, "error": error, **({"note": note} if note else {})}
