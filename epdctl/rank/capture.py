"""A rank's share in a capture: the hops it notes, a torch profile where there is a model, and the word on both."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from epdctl.rank.service import HasHops, Profilable, Recorded, Service
from epdctl.telemetry.hops import Hops
from epdctl.wire.lifecycle import CaptureWritten, StartCapture
from epdctl.wire.trace import HopList

__all__ = ["Capture", "clock_of"]


def clock_of(service: object) -> Callable[[], int]:
    """Nanoseconds of unix time, as everything that this rank records has them."""
    return service.hops.clock if isinstance(service, HasHops) else time.time_ns


class Capture:
    """One at a time; of an earlier one that is begun over, nobody wants the hops any more."""

    def __init__(self, service: Service, tell: Callable[[CaptureWritten], None]) -> None:
        """``tell`` is called on the loop, once for each order."""
        self._service = service
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._hops = service.hops if isinstance(service, HasHops) else Hops()
        self._order: StartCapture | None = None

    def start(self, order: StartCapture) -> None:
        self._order = order
        self._hops.start()
        if order.path is None:
            return  # it lasts until ``stop``

        def written(recorded: Recorded) -> None:
            self._loop.call_soon_threadsafe(self._recorded, order, recorded)

        if isinstance(self._service, Profilable):
            self._service.start_capture(order.path, order.steps, written)
        else:
            self._recorded(order, Recorded(error="this rank has no model to profile"))

    def stop(self) -> None:
        order = self._order
        if order is None:
            return
        if order.path is None:
            self._recorded(order, Recorded())
        elif isinstance(self._service, Profilable):
            self._service.stop_capture()

    def _recorded(self, order: StartCapture, recorded: Recorded) -> None:
        there = order.path is not None and recorded == Recorded()
        word = CaptureWritten(
            capture=order.capture,
            path=order.path if there else None,
            error=recorded.error,
            note=recorded.note,
        )
        if order is not self._order:
            self._tell(word)
            return
        self._order, listed = None, self._hops.stop()
        if order.hops is None:
            self._tell(word)
        else:
            threading.Thread(target=self._write, args=(listed, Path(order.hops), word), name="hops").start()

    def _write(self, listed: HopList, path: Path, word: CaptureWritten) -> None:
        """On a thread of its own, which takes no longer than the disk does."""
        try:
            _write_whole(path, msgspec.json.encode(listed))
        except OSError as error:
            text = f"its hops were not written: {error}"
            word = msgspec.structs.replace(word, error=f"{word.error}; {text}" if word.error else text)
        else:
            word = msgspec.structs.replace(word, hops=str(path))
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, word)


def _write_whole(path: Path, content: bytes) -> None:
    """Beside the target and renamed, so that whoever sees the file sees all of it."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
