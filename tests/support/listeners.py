"""Where the processes of a cluster can be reached from."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import psutil

__all__ = ["OPEN", "exposed", "listeners", "own_addresses", "reachable"]

GUARD_SECONDS = 10.0
OPEN = frozenset({"0.0.0.0", "::"})
Listener = tuple[str, int]  # address, port


def listeners(pids: list[int]) -> dict[Listener, int]:
    """Every TCP socket on which one of these processes waits, and its process."""
    found: dict[Listener, int] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(pid).net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found[one.laddr.ip, one.laddr.port] = pid
    return found


def own_addresses() -> list[str]:
    """IPv4 addresses of this host that others may know it by."""
    found = (one.address for many in psutil.net_if_addrs().values() for one in many if one.family is socket.AF_INET)
    return [address for address in found if not address.startswith("127.")]


def reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), GUARD_SECONDS):
            return True
    except ConnectionRefusedError:
        return False


def exposed(found: dict[Listener, int]) -> Iterator[Listener]:
    """Those that can be reached by an address of this host other than a loopback one."""
    for address, port in found:
        if not address.startswith("127.") and any(reachable(own, port) for own in own_addresses()):
            yield address, port
