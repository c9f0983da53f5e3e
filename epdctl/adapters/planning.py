"""From a file to the Plan that ``plan`` prints and ``up`` runs: the one place where all passes meet."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from epdctl.adapters.base import Adapter
from epdctl.adapters.native import NativeAdapter
from epdctl.errors import UserError
from epdctl.topology.checkpoint import find_checkpoint
from epdctl.topology.hardware import Hardware, probe
from epdctl.topology.load import load
from epdctl.topology.placement import listeners, place
from epdctl.topology.plan import Plan
from epdctl.topology.ports import busy_ports

__all__ = ["ADAPTERS", "make_plan"]

ADAPTERS: Mapping[str, Callable[[Mapping[str, str]], Adapter]] = {"native": NativeAdapter}

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def make_plan(
    path: Path,
    *,
    environ: Mapping[str, str],
    hardware: Hardware | None = None,
    ports_in_use: Mapping[int, str] | None = None,
    name: str | None = None,
) -> Plan:
    """What ``hardware`` and ``ports_in_use`` do not say is probed. ``name`` goes before the file's own.

    Raises TopologyError (the file), PlacementError (this machine) or UserError (the name).
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no cluster name", hint="up to 32 of a-z, 0-9, - and _, beginning with a-z or 0-9")
    topology = load(path, environ)
    checkpoint = find_checkpoint(topology, environ)
    if hardware is None:
        hardware = probe(environ)
    if ports_in_use is None:
        busy = [busy_ports(host, port) for _, host, port in listeners(topology.file)]
        ports_in_use = {port: holder for found in busy for port, holder in found.items()}
    placed = place(topology, checkpoint, hardware, ports_in_use)
    adapter = ADAPTERS[placed.adapter](environ)
    ranks = tuple(adapter.command(rank) for rank in placed.ranks)
    return dataclasses.replace(placed, cluster=name or placed.cluster, ranks=ranks)
