"""Whether the gateway's port is free, and who has it when it is not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

from epdctl.errors import PlacementError

__all__ = ["busy_ports"]


def busy_ports(host: str, port: int) -> Mapping[int, str]:
    """``{}`` when ``port`` can be bound at ``host``, else the port and its holder, as far as we may see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway does: TIME_WAIT is no owner
        try:
            probe.bind((host, port))
        except OSError as error:
            return {port: _holder(port) if error.errno == errno.EADDRINUSE else _refused(host, port, error)}
    return {}


def _refused(host: str, port: int, error: OSError) -> str:
    hint = "ports below 1024 need rights that epdctl should not have" if error.errno == errno.EACCES else None
    raise PlacementError(f"{host}:{port} cannot be used: {error.strerror}", hint=hint) from error


def _holder(port: int) -> str:
    import psutil

    for process in psutil.process_iter(["pid", "name"]):
        try:
            listening = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:  # not ours to look into, or gone meanwhile
            continue
        if port in listening:
            return f"{process.info['name']} (pid {process.info['pid']})"
    return "a process of another user"
