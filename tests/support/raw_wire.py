"""A peer that speaks ZMTP by hand (rfc.zeromq.org/spec/23), so that it can stop in the middle of a frame or lie."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

__all__ = ["RawWire", "connected"]

GUARD_SECONDS = 30.0
MORE, LONG, COMMAND = 1, 2, 4
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"


class RawWire:
    """One connection to an Inbox at a unix socket, after the handshake."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        stream.sendall(GREETING + bytes([COMMAND, len(READY)]) + READY)
        self._exactly(len(GREETING))
        self._frame()

    def announce(self, nbytes: int, *, more: bool = False) -> None:
        """Say that a frame of so many bytes follows."""
        self._stream.sendall(struct.pack(">BQ", LONG | (MORE if more else 0), nbytes))

    def send(self, *frames: bytes) -> None:
        """One whole message."""
        for place, frame in enumerate(frames):
            self.announce(len(frame), more=place < len(frames) - 1)
            self._stream.sendall(frame)

    def part(self, data: bytes) -> None:
        """Bytes of a frame that was announced."""
        self._stream.sendall(data)

    def answer(self) -> bytes:
        """The next frame that comes."""
        return self._frame()

    def hung_up(self) -> bool:
        """Wait for the other end to close; False when it says something instead."""
        try:
            return self._stream.recv(1) == b""
        except ConnectionResetError:
            return True

    def _frame(self) -> bytes:
        (flags,) = self._exactly(1)
        (size,) = struct.unpack(">Q", self._exactly(8)) if flags & LONG else self._exactly(1)
        return self._exactly(size)

    def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            more = self._stream.recv(nbytes - len(data))
            assert more, "the other end hung up"
            data += more
        return data


@contextlib.contextmanager
def connected(endpoint: str) -> Iterator[RawWire]:
    """``endpoint``: ipc://…"""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(GUARD_SECONDS)
        stream.connect(endpoint.removeprefix("ipc://"))
        yield RawWire(stream)
