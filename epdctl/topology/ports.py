"""Whether a port is free, and what is with it when it is not."""

from __future__ import annotations

import errno
import socket

__all__ = ["why_not_free"]


def why_not_free(host: str, port: int) -> str | None:
    """None when ``port`` can be bound at ``host``, else what is with it: who has it, as far as we may see."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway does: TIME_WAIT is no owner
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"in use by {_holder(port)}" if error.errno == errno.EADDRINUSE else _refused(error)
    return None


def _refused(error: OSError) -> str:
    if error.errno == errno.EACCES:
        return "not ours to use: ports below 1024 need rights that epdctl should not have"
    return f"not to be had: {error.strerror}"


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
