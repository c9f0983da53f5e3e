"""The RDMA devices of this machine, and why none of them can be used. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RdmaDevices", "rdma_devices"]


@dataclass(frozen=True, slots=True)
class RdmaDevices:
    """``listed``: by the kernel, which shows those of the host in a container too. ``doors``: what opens them."""

    listed: tuple[str, ...] = ()
    doors: tuple[str, ...] = ()

    @property
    def trouble(self) -> str | None:
        """Why nothing can be sent through them; None when nothing is known against it."""
        if not self.listed:
            return "this machine has no RDMA device"
        if not self.doors:
            return f"{', '.join(self.listed)} cannot be opened: no /dev/infiniband/uverbs* that we may read and write"
        return None


def rdma_devices(root: Path = Path("/")) -> RdmaDevices:
    listed, doors = root / "sys/class/infiniband", root / "dev/infiniband"
    return RdmaDevices(
        tuple(sorted(path.name for path in listed.glob("*"))),
        tuple(sorted(path.name for path in doors.glob("uverbs*") if os.access(path, os.R_OK | os.W_OK))),
    )
