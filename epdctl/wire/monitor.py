"""What ZMQ tells of one socket's connections: that one stands, and that one broke. Lives on the socket's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

__all__ = ["BROKEN", "CONNECTED", "STANDS", "Monitor"]

CONNECTED = int(zmq.EVENT_CONNECTED)  # with the connection's descriptor
STANDS = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
BROKEN = int(zmq.EVENT_DISCONNECTED)  # also after whatever a peer said that ZMQ does not allow

_READABLE = int(zmq.POLLIN)


class Monitor:
    """``told(event, value)`` runs for each of ``CONNECTED``, ``STANDS`` and ``BROKEN``, until it is closed. Over inproc
    there is nothing to tell.
    """

    def __init__(self, watched: zmq.Socket[bytes], told: Callable[[int, int], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched = watched
        self._told = told
        self._socket: zmq.Socket[bytes] = watched.get_monitor_socket(CONNECTED | STANDS | BROKEN)
        self._closed = False
        self._loop.add_reader(self._socket.fileno(), self._events)
        self._loop.call_soon(self._events)  # no edge comes before its events have been asked for once

    def _events(self) -> None:
        while not self._closed and int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:
            event = parse_monitor_message(self._socket.recv_multipart())
            self._told(int(event["event"]), int(event["value"]))

    def close(self) -> None:
        """Before the watched socket is closed."""
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._watched.disable_monitor()
        self._socket.close(linger=0)
