"""What tells Mooncake's engine which protocol to use: its environment, and nothing else does.

Told nothing it takes RDMA where a device works and TCP where none does, whatever protocol it was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["VARIABLES", "environment", "steered"]

VARIABLES: Mapping[str, str] = {  # by protocol; being there is what counts, whatever the value
    "tcp": "MC_FORCE_TCP",
    "rdma": "MC_FORCE_HCA",  # then it does not start where no device works
    "nvlink": "MC_INTRANODE_NVLINK",
}
_QUIET = {"GLOG_minloglevel": "1", "MC_LOG_LEVEL": "WARNING"}


def environment(protocol: str) -> dict[str, str]:
    """Of a process whose engine is to use ``protocol``."""
    return _QUIET | ({VARIABLES[protocol]: "1"} if protocol in VARIABLES else {})


def steered(environ: Mapping[str, str]) -> list[str]:
    """The protocols that ``environ`` asks for."""
    return [protocol for protocol, variable in VARIABLES.items() if variable in environ]
