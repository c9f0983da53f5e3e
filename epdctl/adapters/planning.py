"""From a file to the Plan that ``plan`` prints and ``up`` runs: the one place where all passes meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from epdctl.adapters.base import Adapter
from epdctl.adapters.native import NativeAdapter
from epdctl.errors import Mistake, PlacementError, TopologyError
from epdctl.topology.checkpoint import UNKNOWN, find_checkpoint
from epdctl.topology.document import dotted
from epdctl.topology.hardware import Hardware, probe
from epdctl.topology.load import draft
from epdctl.topology.names import check_name
from epdctl.topology.placement import listeners, place
from epdctl.topology.plan import Plan
from epdctl.topology.ports import why_not_free
from epdctl.topology.schema import Topology

__all__ = ["ADAPTERS", "Found", "make_plan"]

ADAPTERS: Mapping[str, Callable[[Mapping[str, str]], Adapter]] = {"native": NativeAdapter}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of the machine. ``hardware`` and ``ports_in_use`` (port → what is with it) are probed where None.

    ``held``: port → name of the running cluster that listens there.
    """

    hardware: Hardware | None = None
    ports_in_use: Mapping[int, str] | None = None
    held: Mapping[int, str] = field(default_factory=dict)


def make_plan(path: Path, *, environ: Mapping[str, str], found: Found | None = None, name: str | None = None) -> Plan:
    """``name`` goes before the file's own.

    Raises TopologyError (mistakes of the file, and with them all that this machine lacks, in the file's order),
    PlacementError (this machine alone) or UserError (the name).
    """
    if name is not None:
        check_name(name)
    drafted = draft(path, environ)
    if drafted.topology is None:
        raise TopologyError(drafted.mistakes)
    topology = dataclasses.replace(drafted.topology, cluster=name or drafted.topology.cluster)
    mistakes, found = list(drafted.mistakes), found or Found()
    checkpoint = UNKNOWN
    if not topology.doubts(("model", "path"), ("model", "revision")):
        checkpoint = _gathered(mistakes, lambda: find_checkpoint(topology, environ)) or UNKNOWN
    ports, notes = _ports(topology, found)
    hardware = found.hardware or _gathered(mistakes, lambda: probe(environ))
    placed = None if hardware is None else _gathered(mistakes, lambda: place(topology, checkpoint, hardware, ports))
    if mistakes or placed is None:
        raise TopologyError(mistakes)
    adapter = ADAPTERS[placed.adapter](environ)
    ranks = tuple(adapter.command(rank) for rank in placed.ranks)
    return dataclasses.replace(placed, ranks=ranks, notes=(*placed.notes, *notes))


def _gathered(mistakes: list[Mistake], step: Callable[[], T]) -> T | None:
    """What ``step`` makes; None where it cannot, with the reasons added to ``mistakes``."""
    try:
        return step()
    except TopologyError as error:
        mistakes += error.mistakes
    except PlacementError as error:
        if not mistakes:
            raise
        mistakes += error.mistakes or [Mistake("this machine", "", error.message, error.hint)]
    return None


def _ports(topology: Topology, found: Found) -> tuple[Mapping[int, str], list[str]]:
    """What is with the ports that are not free, and a note for each that this very cluster has."""
    if found.ports_in_use is not None:
        return found.ports_in_use, []
    ports: dict[int, str] = {}
    notes: list[str] = []
    for trail, host, port in listeners(topology.file):
        if topology.doubts(trail, (*trail[:-1], "host")):
            continue
        if (why := why_not_free(host, port)) is None:
            continue
        holder = found.held.get(port)
        if holder == topology.cluster:
            notes.append(f"{dotted(trail)}: {port} is in use by this cluster, which is up")
        else:
            ports[port] = why if holder is None else f"in use by the cluster {holder!r}, which is up"
    return ports, notes
