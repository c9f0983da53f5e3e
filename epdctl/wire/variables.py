"""What the ways to move bytes read from a process's environment. ``plan`` shows it.

Nothing else tells Mooncake's engine which protocol to use: told nothing it takes RDMA where a device works and TCP
where none does, whatever protocol it was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MOONCAKE", "environment", "steered"]

MOONCAKE: Mapping[str, str] = {  # by protocol; being there is what counts, whatever the value
    "tcp": "MC_FORCE_TCP",
    "rdma": "MC_FORCE_HCA",  # then it does not start where no device works
    "nvlink": "MC_INTRANODE_NVLINK",
}
_QUIET = {"GLOG_minloglevel": "1", "MC_LOG_LEVEL": "WARNING"}
_KEPT = {  # for the next frame: else glibc gives each back to the kernel, which was half of the time at 16 MiB
    "MALLOC_MMAP_THRESHOLD_": f"{32 << 20}",
    "MALLOC_TRIM_THRESHOLD_": f"{128 << 20}",
}


def environment(backend: str, protocol: str) -> dict[str, str]:
    """Of a process that moves bytes so."""
    match backend:
        case "mooncake":
            return _QUIET | {MOONCAKE[protocol]: "1"}
        case "zmq":
            return dict(_KEPT)
        case _:
            return {}


def steered(environ: Mapping[str, str]) -> list[str]:
    """The protocols of Mooncake that ``environ`` asks for."""
    return [protocol for protocol, variable in MOONCAKE.items() if variable in environ]
