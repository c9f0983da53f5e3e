"""Stops a real move of bytes when half of them are there, for whatever a test has in mind with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from epdctl.errors import TransferError
from epdctl.transfer import cuda, landing, mooncake_engine, shm, zmq
from epdctl.transfer.mooncake_engine import Engine
from epdctl.transfer.runs import Run

__all__ = ["Halfway"]

GUARD_SECONDS = 60.0
Patch = Callable[[object, str, Any], None]


class Halfway:
    """Stands in the way of the first move after ``arm``: half of it is made, the rest when it is ``let_go``.

    ``gives_up``: the mover says meanwhile that it failed, as Mooncake's engine does when its time is over.
    """

    def __init__(self, backend: str, patch: Patch = setattr) -> None:
        self.reached, self.opened, self.moved = threading.Event(), threading.Event(), threading.Event()
        self._armed = False
        self._gives_up = False
        within = {
            "shm": self._within_shm,
            "mooncake": self._within_mooncake,
            "zmq": self._within_zmq,
            "cuda-ipc": self._within_cuda,
        }
        within[backend](patch)

    def arm(self, *, gives_up: bool = False) -> None:
        for event in (self.reached, self.opened, self.moved):
            event.clear()
        self._armed, self._gives_up = True, gives_up

    def let_go(self) -> None:
        self.opened.set()

    def _taken(self) -> bool:
        """This is the move that was meant."""
        armed, self._armed = self._armed, False
        return armed

    def _stand(self, rest: Callable[[], None]) -> None:
        self.reached.set()
        if self._gives_up:
            threading.Thread(target=self._go_on, args=(rest,), daemon=True).start()
            raise TransferError("the engine gave up, and goes on")
        self._go_on(rest)

    def _go_on(self, rest: Callable[[], None]) -> None:
        assert self.opened.wait(GUARD_SECONDS), "nobody let the bytes go on"
        try:
            rest()
        finally:
            self.moved.set()

    def _within_shm(self, patch: Patch) -> None:
        real = shm._Copier.copy

        def copy(copier: Any, target: Any, source: Any) -> None:
            if not self._taken():
                real(copier, target, source)
                return
            middle = source.numel() // 2
            real(copier, target[:middle], source[:middle])
            self._stand(lambda: real(copier, target[middle:], source[middle:]))

        patch(shm._Copier, "copy", copy)
        patch(shm.ShmMover, "inline_bytes", 0)  # on the loop nothing may wait

    def _within_mooncake(self, patch: Patch) -> None:
        real = Engine.write

        def write(engine: Engine, session: str, runs: list[Run]) -> None:
            if not self._taken():
                real(engine, session, runs)
                return
            first, rest = _halves(runs)
            real(engine, session, first)
            self._stand(lambda: real(engine, session, rest))

        patch(mooncake_engine.Engine, "write", write)

    def _within_cuda(self, patch: Patch) -> None:
        """Copies to peers, and not what is read of them."""
        real = cuda._Gpu.copies

        def copies(gpu: Any) -> Any:
            stream: Any = real(gpu)
            begin = stream.begin

            def moved(runs: list[Run]) -> None:
                begin(runs)
                stream.finish()

            def halved(runs: list[Run]) -> None:
                if not self._taken():
                    begin(runs)
                    return
                first, rest = _halves(runs)
                moved(first)
                self._stand(lambda: moved(rest))

            stream.begin = halved
            return stream

        patch(cuda._Gpu, "copies", copies)

    def _within_zmq(self, patch: Patch) -> None:
        """Its messages are made so small that a write of a few hundred KiB has many."""
        real = zmq._packed
        count = 0

        async def packed(parcel: landing.Parcel, *, checksum: bool) -> Any:
            nonlocal count
            count = count + 1 if self._armed else 0
            if count == 5 and self._taken():
                self.reached.set()
                await asyncio.to_thread(self.opened.wait, GUARD_SECONDS)
                self.moved.set()
            return await real(parcel, checksum=checksum)

        patch(landing, "PARCEL_BYTES", 64 << 10)
        patch(zmq, "_packed", packed)


def _halves(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    halves = [(run, run.nbytes // 2) for run in runs]
    first = [Run(run.source, run.target, half) for run, half in halves]
    return first, [Run(run.source + half, run.target + half, run.nbytes - half) for run, half in halves]
