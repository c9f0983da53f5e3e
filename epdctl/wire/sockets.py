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
from zmq.utils.monitor import parse_monitor_message

from epdctl.errors import BadMessage, PeerGone
from epdctl.wire.message import Codec

__all__ = ["Buffer", "Inbox", "Link", "Sender"]

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
Sender = bytes  # the identity of one connected Link, as its Inbox sees it

MAX_FRAME_BYTES = 256 << 20
HIGH_WATER = 4096  # messages, each way
BURST = 64  # messages handled before the loop's other work gets a turn
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
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, HIGH_WATER),
            (zmq.RCVHWM, HIGH_WATER),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        ):
            self._socket.setsockopt(option, value)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._turn: asyncio.Handle | None = None
        self.closed = False
        self.bad_frames = 0

    def _start(self) -> None:
        self._loop.add_reader(self._fd, self._events)
        self._later()

    def _later(self) -> None:
        if self._turn is None and not self.closed:
            self._turn = self._loop.call_soon(self._events)

    def _events(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        for _ in range(BURST):
            if self.closed:
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

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self._turn is not None:
            self._turn.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)


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
        """Raises PeerGone when the sender has closed or stopped reading."""
        if self.closed:
            raise PeerGone("this inbox is closed")
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
        self._outbox: deque[list[Buffer]] = deque()
        self._monitor: zmq.Socket[bytes] | None = None
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        if send_buffer and endpoint.startswith("ipc://"):
            self._widen(send_buffer)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise PeerGone(f"cannot connect to {endpoint!r}: {error}") from error
        self._start()

    def _advance(self, events: int) -> bool:
        if self._outbox and events & _WRITABLE:
            self._flush()
            return True
        return super()._advance(events)

    def _flush(self) -> None:
        with contextlib.suppress(zmq.Again):
            while self._outbox:
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

        Raises PeerGone when the link is closed or its outbox is full.
        """
        if self.closed:
            raise PeerGone(f"{self.endpoint} was withdrawn")
        if len(self._outbox) >= HIGH_WATER:
            raise PeerGone(f"{self.endpoint} does not read")
        self._outbox.append([self._outgoing.encode(message), *frames])
        self._flush()

    def _widen(self, nbytes: int) -> None:
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED)
        self._loop.add_reader(self._monitor.fileno(), self._connected, self._monitor, nbytes)
        self._connected(self._monitor, nbytes)  # no edge comes before its events have been asked for once

    def _connected(self, monitor: zmq.Socket[bytes], nbytes: int) -> None:
        while int(monitor.getsockopt(zmq.EVENTS)) & _READABLE:
            fd = parse_monitor_message(monitor.recv_multipart())["value"]
            with contextlib.suppress(OSError):  # it may be gone again
                connection = socket.socket(fileno=fd)
                try:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)
                finally:
                    connection.detach()  # it stays ZMQ's

    def close(self) -> None:
        self._outbox.clear()
        if self._monitor is not None:
            self._loop.remove_reader(self._monitor.fileno())
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        super().close()
