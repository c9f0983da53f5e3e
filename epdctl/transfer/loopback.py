"""Keeps listening sockets that a library opened in this process off the network.

A socket that is tied to the loopback device is not found by what arrives at any other: whoever tries is refused by
the kernel, before the library sees a byte. Linux lets every process do that to its own sockets since version 5.7.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable, Iterator

__all__ = ["can_keep", "keep_on_loopback", "listening", "port_of"]

DEVICE = b"lo\0"


def listening() -> frozenset[int]:
    """The descriptors of this process on which it waits for TCP connections."""
    return frozenset(fd for fd in map(int, os.listdir("/proc/self/fd")) if _listens(fd))


def keep_on_loopback(sockets: Iterable[int]) -> None:
    """Raises OSError where the kernel does not allow it; some of them may have been tied by then."""
    for fd in sockets:
        with _view(fd) as view:
            view.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, DEVICE)


def port_of(fd: int) -> int:
    """Of a socket that ``listening`` found."""
    with _view(fd) as view:
        return int(view.getsockname()[1])


def can_keep() -> bool:
    """Whether ``keep_on_loopback`` works here."""
    with socket.socket() as probe:
        try:
            keep_on_loopback([probe.fileno()])
        except OSError:
            return False
    return True


def _listens(fd: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with _view(fd) as view:
            inet = view.family in (socket.AF_INET, socket.AF_INET6)
            return inet and bool(view.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # closed meanwhile: the listing's own descriptor always is
        return False


@contextlib.contextmanager
def _view(fd: int) -> Iterator[socket.socket]:
    """Left open for its owner."""
    view = socket.socket(fileno=fd)
    try:
        yield view
    finally:
        view.detach()
