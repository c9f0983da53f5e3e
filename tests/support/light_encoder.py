"""An encoder rank without torch: starts in a moment, speaks every message of a real one, and makes values from bytes.

The model's name is the token of the slots' owner. A picture called ``hang`` holds the compute thread for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections.abc import Sequence

from epdctl.encoder.notices import Notices
from epdctl.rank.compute import ComputeThread
from epdctl.rank.service import Progress, Pulse
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import (
    ROUTER_TO_WORKER,
    WORKER_TO_ROUTER,
    CancelItem,
    EmbeddingLanded,
    Encode,
    EncodeItem,
    ItemEncoded,
    ItemSized,
    RouterToWorker,
    WorkerToRouter,
)
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.sockets import Inbox, Link, Sender
from epdctl.wire.transfer import (
    RECEIVER_TO_WRITER,
    WRITER_TO_RECEIVER,
    Landed,
    PieceHeader,
    ReceiverToWriter,
    RemoteLease,
    TensorSpec,
    Write,
    WriterToReceiver,
)

WIDTH = 16  # bytes of one row


def value(media: bytes | memoryview, rows: int) -> bytes:
    """What is made of a picture: WIDTH bytes for each row."""
    return b"".join(hashlib.blake2b(media, digest_size=WIDTH, salt=row.to_bytes(4)).digest() for row in range(rows))


def spec_of(job: Encode) -> TensorSpec:
    return TensorSpec(dtype="uint8", shape=[job.item.rows, WIDTH], nbytes=job.item.rows * WIDTH)


class LightEncoder:
    """A Service."""

    def __init__(self, spec: RankSpec) -> None:
        self._token = spec.config.model.name
        self._compute = ComputeThread()
        self._notices = Notices()
        self._writers: dict[str, Link[ReceiverToWriter, WriterToReceiver]] = {}
        self._numbers = itertools.count(1)
        self._written: dict[int, asyncio.Future[bool]] = {}
        self._items: dict[int, asyncio.Task[None]] = {}
        self._completed = 0
        self._inbox: Inbox[RouterToWorker] = Inbox(spec.endpoint("inbox"), ROUTER_TO_WORKER, self._arrived)

    async def start(self, progress: Progress) -> Endpoints:
        return Endpoints(inbox=self._inbox.endpoint)

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        pass

    def _arrived(self, router: Sender, message: RouterToWorker, frames: list[memoryview]) -> None:
        if isinstance(message, CancelItem):
            if (task := self._items.pop(message.dispatch, None)) is not None:
                task.cancel()
        elif isinstance(message, EncodeItem):
            self._items[message.dispatch] = asyncio.ensure_future(self._encode(router, message, frames[0]))

    async def _encode(self, router: Sender, order: EncodeItem, media: memoryview) -> None:
        job, spec = order.job, spec_of(order.job)
        self._tell(router, ItemSized(dispatch=order.dispatch, spec=spec))
        made = await self._compute.run(lambda: self._forward(media, job.item.rows))
        assert job.slot is not None
        if await self._write(job.slot, made):
            landed = EmbeddingLanded(
                request=job.request,
                attempt=job.attempt,
                index=job.item.index,
                lease=job.slot.lease,
                generation=job.slot.generation,
                spec=spec,
            )
            self._notices.send(job.notify, landed)
        self._tell(router, ItemEncoded(dispatch=order.dispatch, spec=spec))
        self._completed += 1
        del self._items[order.dispatch]

    def _forward(self, media: memoryview, rows: int) -> bytes:
        if bytes(media) == b"hang":
            threading.Event().wait()
        return value(media, rows)

    async def _write(self, slot: RemoteLease, data: bytes) -> bool:
        """False when the slot is somebody else's by now."""
        endpoint = slot.pool.endpoint
        if endpoint not in self._writers:
            self._writers[endpoint] = Link(endpoint, RECEIVER_TO_WRITER, WRITER_TO_RECEIVER, self._answered)
        number = next(self._numbers)
        future = self._written[number] = asyncio.get_running_loop().create_future()
        write = Write(
            write=number,
            pool=slot.pool.pool,
            lease=slot.lease,
            generation=slot.generation,
            pieces=[PieceHeader(extent=0, offset=0, nbytes=len(data))],
            token=self._token,
        )
        self._writers[endpoint].send(write, [data])
        landed: bool = await future
        return landed

    def _answered(self, answer: ReceiverToWriter, _: Sequence[memoryview]) -> None:
        assert not hasattr(answer, "session")
        self._written.pop(getattr(answer, "write", 0)).set_result(isinstance(answer, Landed))

    def _tell(self, router: Sender, message: WorkerToRouter) -> None:
        self._inbox.reply(router, message, WORKER_TO_ROUTER)

    def pulse(self) -> Pulse:
        return Pulse(inflight=len(self._items), completed=self._completed, standstill=self._compute.job_seconds)

    async def drain(self) -> None:
        await asyncio.gather(*self._items.values())

    async def close(self) -> None:
        self._inbox.close()
        self._notices.close()
        for link in self._writers.values():
            link.close()


class SecondLifeOnly(LightEncoder):
    """Its first incarnation dies before it has said where it can be reached."""

    def __init__(self, spec: RankSpec) -> None:
        if spec.incarnation == 1:
            raise RuntimeError("before it connected")
        super().__init__(spec)
