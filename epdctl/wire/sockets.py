"""The two ZMQ sockets of the data plane: an Inbox that a rank binds, and a Link that a peer connects to it.

Both belong to one event loop and deliver by calling a handler, so that a decision is made where the message arrives.
Sends never wait: a Link keeps a bounded outbox until the connection stands, and what does not fit is PeerGone.
Every incarnation has its own endpoint; closing a Link drops whatever it still held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import zmq

from epdctl.errors import BadMessage, PeerGone
from epdctl.wire.message import Codec
from epdctl.wire.monitor import BROKEN, CONNECTED, STANDS, Monitor

__all__ = ["MAX_FRAME_BYTES", "Buffer", "Inbox", "Link", "Sender"]

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
Sender = bytes  # the identity of one connected Link, as its Inbox sees it

MAX_FRAME_BYTES = 256 << 20  # ZMQ drops the connection that brings a larger one, and does not make it anew
HIGH_WATER = 4096  # messages, each way
BURST = 64  # messages handled before the loop's other work gets a turn
REOPEN_SECONDS = 0.1  # before a connection that broke is made anew
ZERO_COPY_BYTES = 65_536  # below this a copy is cheaper than tracking the buffer

# Numbers, not enums: combining those for every frame was a tenth of the router's time.
_READABLE, _WRITABLE = int(zmq.POLLIN), int(zmq.POLLOUT)
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

In = TypeVar("In")
Out = TypeVar("Out")


class _Socket:
    """A zmq socket driven by an asyncio loop.

    ZMQ's file descriptor is edge-triggered: it must be followed by reading EVENTS until they are empty, and every
    send may swallow an edge; hence ``_events`` after both.
    """

    def __init__(self, kind: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = _made(kind)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._turn: asyncio.Handle | None = None
        self.closed = False
        self.bad_frames = 0

    def _start(self) -> None:
        self._loop.add_reader(self._fd, self._events)
        self._later()

    def _later(self) -> None:
        if self._turn is None and not self._shut:
            self._turn = self._loop.call_soon(self._events)

    @property
    def _shut(self) -> bool:
        """There is no socket to do anything with."""
        return self._socket.closed

    def _events(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        for _ in range(BURST):
            if self._shut:
                return
            if not self._advance(int(self._socket.getsockopt(zmq.EVENTS))):
                return
        self._later()

    def _advance(self, events: int) -> bool:
        """Do one thing that ``events`` allows; False when there is nothing to do."""
        if not events & _READABLE:
            return False
        with contextlib.suppress(zmq.Again):
            self._handle(self._received())
        return True

    def _received(self) -> list[zmq.Frame]:
        """One whole message: its frames come together, and each knows whether it is the last."""
        frames = [self._socket.recv(_LAST, copy=False)]
        while frames[-1].more:
            frames.append(self._socket.recv(_LAST, copy=False))
        return frames

    def _handle(self, frames: list[zmq.Frame]) -> None:
        raise NotImplementedError

    def _drop(self, error: BadMessage) -> None:
        """Each power of two is logged: the first ones in full, a flood without filling the disk."""
        self.bad_frames += 1
        if self.bad_frames & (self.bad_frames - 1) == 0:
            log.warning("dropped a message: %s (%d dropped so far)", error, self.bad_frames)

    def _transmit(self, frames: Sequence[Buffer]) -> None:
        last = len(frames) - 1
        for position, frame in enumerate(frames):
            flags = _MORE if position < last else _LAST
            if len(frame) < ZERO_COPY_BYTES:
                self._socket.send(frame, flags)
            else:
                self._socket.send(_as_received(frame), flags, copy=False)
        self._later()

    def _release(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if not self._shut:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def close(self) -> None:
        self.closed = True
        self._release()


def _made(kind: int) -> zmq.Socket[bytes]:
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, HIGH_WATER),
        (zmq.RCVHWM, HIGH_WATER),
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
    ):
        made.setsockopt(option, value)
    return made


def _check(frames: Sequence[Buffer]) -> None:
    """What is too large for the other end is refused here: there it would cost the whole connection."""
    for frame in frames:
        if len(frame) > MAX_FRAME_BYTES:
            raise BadMessage(f"a frame of {len(frame)} bytes; the limit is {MAX_FRAME_BYTES}")


@contextlib.contextmanager
def _owner_only() -> Iterator[None]:
    """What is created inside is 0600."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _as_received(frame: Buffer) -> Buffer | zmq.Frame:
    """A frame that came whole from another socket goes on as ZMQ's own message, which counts its readers itself; any
    other buffer needs a thread of pyzmq's to be let go of.
    """
    owner: object = frame.obj if isinstance(frame, memoryview) else None
    return owner if isinstance(owner, zmq.Frame) and len(owner) == len(frame) else frame


def _payload(frames: Sequence[zmq.Frame]) -> list[memoryview]:
    return [frame.buffer for frame in frames]


class Inbox(_Socket, Generic[In]):
    """Bound at ``endpoint``; ``handler(sender, message, frames)`` runs for each message that the codec accepts.

    ``frames`` are views of ZMQ's own memory, valid as long as they are referenced. A unix socket is made 0600.
    Raises OSError when the endpoint cannot be bound.
    """

    def __init__(
        self, endpoint: str, incoming: Codec[In], handler: Callable[[Sender, In, list[memoryview]], None]
    ) -> None:
        super().__init__(zmq.ROUTER)
        self.endpoint = endpoint
        self._incoming = incoming
        self._handler = handler
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            with _owner_only():
                self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"cannot listen at {endpoint}: {error}") from error
        self._start()

    def _handle(self, frames: list[zmq.Frame]) -> None:
        try:
            if len(frames) < 2:
                raise BadMessage(f"{len(frames)} frames")
            message = self._incoming.decode(frames[1].buffer)
        except BadMessage as error:
            self._drop(error)
            return
        self._handler(frames[0].bytes, message, _payload(frames[2:]))

    def reply(self, to: Sender, message: Out, codec: Codec[Out], frames: Sequence[Buffer] = ()) -> None:
        """Raises PeerGone when the sender has closed or stopped reading, BadMessage for a frame that is too large."""
        if self.closed:
            raise PeerGone("this inbox is closed")
        _check(frames)
        try:
            self._transmit([to, codec.encode(message), *frames])
        except zmq.ZMQError as error:
            raise PeerGone(f"cannot reach the peer: {error}") from error


class Link(_Socket, Generic[In, Out]):
    """Connected to one incarnation's inbox; answers come to ``handler(message, frames)``.

    ``send_buffer``: bytes that the kernel of a unix socket takes before it waits for the reader; with its own 208 KiB a
    frame of megabytes takes the two ends hundreds of turns. Raises PeerGone when no socket can ever be at ``endpoint``:
    addresses come from peers.
    """

    def __init__(
        self,
        endpoint: str,
        incoming: Codec[In],
        outgoing: Codec[Out],
        handler: Callable[[In, list[memoryview]], None],
        *,
        send_buffer: int = 0,
    ) -> None:
        super().__init__(zmq.DEALER)
        self.endpoint = endpoint
        self._incoming = incoming
        self._outgoing = outgoing
        self._handler = handler
        self._send_buffer = send_buffer if endpoint.startswith("ipc://") else 0
        self._standing: Callable[[bool], None] | None = None
        self._outbox: deque[list[Buffer]] = deque()
        self._monitor: Monitor | None = None
        self._reopening: asyncio.TimerHandle | None = None
        try:
            self._connect()
        except zmq.ZMQError as error:
            self.close()
            raise PeerGone(f"cannot connect to {endpoint!r}: {error}") from error

    def _connect(self) -> None:
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        if self._send_buffer or self._standing is not None:
            self._monitor = Monitor(self._socket, self._noticed)
        self._socket.connect(self.endpoint)
        self._start()

    def watch(self, standing: Callable[[bool], None]) -> None:
        """``standing`` runs with True when the connection stands from now on, and with False when it broke, which may
        cost whatever was under way on it; it is made anew then, also where ZMQ has given it up. Called right after the
        link was made.
        """
        self._standing = standing
        if self._monitor is None:
            self._monitor = Monitor(self._socket, self._noticed)

    def _noticed(self, event: int, value: int) -> None:
        if event == CONNECTED and self._send_buffer:
            self._widen(value)
        elif self._standing is not None and event == STANDS:
            self._standing(True)
        elif self._standing is not None and event == BROKEN:
            self._broke()
            self._standing(False)

    def _broke(self) -> None:
        """What has come is still handled; what waits in the outbox goes out when the connection stands again."""
        log.info("the connection to %s broke", self.endpoint)
        for _ in range(HIGH_WATER):
            if self._shut or not super()._advance(int(self._socket.getsockopt(zmq.EVENTS))):
                break
        if not self.closed:
            self._release()
            self._reopening = self._loop.call_later(REOPEN_SECONDS, self._reopen)

    def _reopen(self) -> None:
        """Out of descriptors or memory, it is tried again: what is in short supply now may come back."""
        try:
            self._socket = _made(zmq.DEALER)
            self._fd = int(self._socket.getsockopt(zmq.FD))
            self._connect()
        except zmq.ZMQError as error:
            log.warning("the connection to %s cannot be made anew yet: %s", self.endpoint, error)
            self._release()
            self._reopening = self._loop.call_later(REOPEN_SECONDS, self._reopen)

    def _advance(self, events: int) -> bool:
        if self._outbox and events & _WRITABLE:
            self._flush()
            return True
        return super()._advance(events)

    def _flush(self) -> None:
        with contextlib.suppress(zmq.Again):
            while self._outbox and not self._shut:
                self._transmit(self._outbox[0])
                self._outbox.popleft()

    def _handle(self, frames: list[zmq.Frame]) -> None:
        try:
            message = self._incoming.decode(frames[0].buffer)
        except BadMessage as error:
            self._drop(error)
            return
        self._handler(message, _payload(frames[1:]))

    def send(self, message: Out, frames: Sequence[Buffer] = ()) -> None:
        """Send now or, while the connection is being made, as soon as it stands.

        Raises PeerGone when the link is closed or its outbox is full, BadMessage for a frame that is too large.
        """
        if self.closed:
            raise PeerGone(f"{self.endpoint} was withdrawn")
        if len(self._outbox) >= HIGH_WATER:
            raise PeerGone(f"{self.endpoint} does not read")
        _check(frames)
        self._outbox.append([self._outgoing.encode(message), *frames])
        self._flush()

    def _widen(self, connection: int) -> None:
        with contextlib.suppress(OSError):  # it may be gone again
            wide = socket.socket(fileno=connection)
            try:
                wide.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
            finally:
                wide.detach()  # it stays ZMQ's

    def _release(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        super()._release()

    def close(self) -> None:
        if self._reopening is not None:
            self._reopening.cancel()
        self._outbox.clear()
        super().close()
