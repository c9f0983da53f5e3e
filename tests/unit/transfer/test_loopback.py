"""Sockets that a library opened for everybody are for this host only once they were tied to the loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from epdctl.transfer.loopback import can_keep, keep_on_loopback, listening
from tests.support.listeners import exposed, listeners, own_addresses, reachable


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server


def test_only_tcp_sockets_that_wait_are_found(listener: socket.socket, sockets: Path) -> None:
    with socket.socket() as idle, socket.socket(socket.AF_UNIX) as local, open(os.devnull) as file:
        local.bind(f"{sockets}/local")
        local.listen()
        found = listening()
        assert listener.fileno() in found
        assert not found.intersection({idle.fileno(), local.fileno(), file.fileno()})


def test_what_was_tied_to_the_loopback_is_reached_from_there_alone(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    mine = {one: pid for one, pid in listeners([os.getpid()]).items() if one[1] == port}
    assert list(exposed(mine)) == ([("0.0.0.0", port)] if own_addresses() else [])
    assert can_keep()
    keep_on_loopback([listener.fileno()])
    assert list(exposed(mine)) == []
    assert reachable("127.0.0.1", port)


def test_a_kernel_that_forbids_it_is_an_error() -> None:
    reader, writer = os.pipe()  # no socket: refused as an old kernel refuses
    try:
        with pytest.raises(OSError, match="non-socket"):
            keep_on_loopback([reader])
    finally:
        os.close(reader)
        os.close(writer)
