"""Services without a model that do what their model's name says; for tests of the process around a service."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Sequence

from epdctl.errors import IncompatiblePeer, LoadError
from epdctl.rank.compute import ComputeThread
from epdctl.rank.service import Progress, Pulse, Recorded, Written
from epdctl.rank.tasks import Tasks
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import ROUTER_TO_WORKER, WORKER_TO_ROUTER, EncodeItem, ItemEncoded, RouterToWorker
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.transfer import TensorSpec


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


AT_LOAD: dict[str, Callable[[], BaseException]] = {
    "bad-checkpoint": lambda: LoadError("no key visual.blocks.0", hint="is it the whole checkpoint?"),
    "no-memory": lambda: MemoryError("at load"),
    "no-gpu-memory": lambda: OutOfMemoryError("CUDA out of memory"),
    "port-taken": lambda: OSError(errno.EADDRINUSE, "address in use"),
    "incompatible": lambda: IncompatiblePeer("transformers 5.17 here, 5.23 there"),
    "bug": lambda: ZeroDivisionError("at load"),
}


def _fail(text: str) -> None:
    raise ZeroDivisionError(text)


async def _fail_soon(text: str) -> None:
    raise ZeroDivisionError(text)


class FakeService:
    """Its pulse tells the last table of peers, so that a test can see what arrived."""

    def __init__(self, spec: RankSpec) -> None:
        self._behaviour = spec.config.model.name
        self._peers: list[str] = []
        self._tables = 0
        self._tasks = Tasks()
        self._written: Written | None = None

    async def start(self, progress: Progress) -> Endpoints:
        if self._behaviour in AT_LOAD:
            raise AT_LOAD[self._behaviour]()
        if self._behaviour == "hang":
            progress("weights", 1, 3)
            await asyncio.Event().wait()
        if self._behaviour == "hang-in-thread":
            progress("weights", 1, 3)
            await asyncio.to_thread(threading.Event().wait)
        for done in range(3):
            progress("weights", done, 2)
        return Endpoints(inbox="ipc:///somewhere")

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._tables += 1
        self._peers = [f"{peer.rank}#{peer.incarnation}" for peer in peers]
        match self._peers:
            case ["gateway/1#1"]:
                asyncio.get_running_loop().call_soon(_fail, "in a callback")
            case ["gateway/2#1"]:
                self._tasks.start(_fail_soon("in a task"))
            case ["gateway/3#1"]:
                ComputeThread().post(lambda: _fail("on the compute thread"))
            case ["gateway/4#1"]:
                raise MemoryError("while serving")
            case ["gateway/5#1"]:
                os._exit(0)

    def pulse(self) -> Pulse:
        return Pulse(inflight=1, completed=self._tables, free_pages=3, total_pages=4, unhealthy=",".join(self._peers))

    async def drain(self) -> None:
        if self._behaviour == "never-idle":
            await asyncio.Event().wait()

    def start_capture(self, path: str, steps: int | None, written: Written) -> None:
        self._written = written
        if steps is not None:
            threading.Thread(target=written, args=(Recorded(error=None if steps else "no steps"),)).start()

    def stop_capture(self) -> None:
        if self._written is not None:
            self._written(Recorded())

    async def close(self) -> None:
        if self._behaviour == "never-closes":
            await asyncio.Event().wait()
        await self._tasks.close()


class BusyOnce(FakeService):
    """Works from its start until it hears of a peer."""

    def __init__(self, spec: RankSpec) -> None:
        super().__init__(spec)
        self._idle = asyncio.Event()

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._idle.set()

    def pulse(self) -> Pulse:
        return Pulse(inflight=int(not self._idle.is_set()))

    async def until_idle(self) -> None:
        await self._idle.wait()


class NeverReady(FakeService):
    """Loads for ever."""

    async def start(self, progress: Progress) -> Endpoints:
        progress("weights", 1, 3)
        never: asyncio.Future[Endpoints] = asyncio.get_running_loop().create_future()
        return await never


class FakeEncoder(FakeService):
    """Says at once that an item is encoded; one whose model is called "holds" never does."""

    def __init__(self, spec: RankSpec) -> None:
        super().__init__(spec)
        self._inbox = Inbox(spec.endpoint("inbox"), ROUTER_TO_WORKER, self._arrived)
        self._holds = spec.config.model.name == "holds"
        self._items = 0

    async def start(self, progress: Progress) -> Endpoints:
        return Endpoints(inbox=self._inbox.endpoint)

    def _arrived(self, router: Sender, message: RouterToWorker, frames: list[memoryview]) -> None:
        self._items += 1
        if isinstance(message, EncodeItem) and not self._holds:
            spec = TensorSpec(dtype="float32", shape=[len(frames[0])], nbytes=0)
            self._inbox.reply(router, ItemEncoded(dispatch=message.dispatch, spec=spec), WORKER_TO_ROUTER)

    def pulse(self) -> Pulse:
        return Pulse(inflight=self._items)
