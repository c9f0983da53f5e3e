"""Options that several verbs share, and the completion of names from the cluster that runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from epdctl.control.client import Client
    from epdctl.topology.plan import Plan

__all__ = [
    "LOOK",
    "MEASURE",
    "RUN",
    "WRITE",
    "Cluster",
    "File",
    "Globals",
    "Json",
    "Logs",
    "Name",
    "Ranks",
    "chosen_cluster",
    "client",
    "make_plan",
    "topology_file",
]

RUN, LOOK, WRITE, MEASURE = "Run a cluster", "Look at it", "Write a topology", "Measure and mend"


@dataclass(frozen=True, slots=True)
class Globals:
    """What was said before the verb."""

    cluster: str | None = None


def complete_ranks(ctx: typer.Context, incomplete: str) -> list[str]:
    """Rank and stage names of the cluster that runs; nothing when none does."""
    from epdctl.control.cluster import find_cluster
    from epdctl.errors import EpdError

    said = ctx.params.get("cluster") or (ctx.parent.params.get("cluster") if ctx.parent else None)
    try:
        ranks = find_cluster(chosen_cluster(ctx, said), os.environ).record.ranks
    except EpdError:
        return []
    names = ranks + sorted({rank.partition("/")[0] for rank in ranks})
    return [name for name in names if name.startswith(incomplete)]


def complete_logs(ctx: typer.Context, incomplete: str) -> list[str]:
    return complete_ranks(ctx, incomplete) + [name for name in ("daemon",) if name.startswith(incomplete)]


def complete_clusters(incomplete: str) -> list[str]:
    from epdctl.control.cluster import list_clusters

    return [cluster.name for cluster in list_clusters(os.environ) if cluster.name.startswith(incomplete)]


def complete_profiles(incomplete: str) -> list[str]:
    from epdctl.topology.profiles import list_profiles

    return [name for name in list_profiles() if name.startswith(incomplete)]


Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", metavar="NAME", autocompletion=complete_clusters, help="Which cluster, when several run."
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", "--cluster", metavar="NAME", help="What to call the cluster, in place of the file's name."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each reply.")]
File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", envvar="EPDCTL_FILE", help="The topology; ./epdctl.yaml when none is named."),
]
Ranks = Annotated[
    list[str] | None,
    typer.Argument(metavar="RANK", autocompletion=complete_ranks, help="Rank names (encoder/0) or stages; else all."),
]


Logs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RANK", autocompletion=complete_logs, help="Rank names, stages, or daemon; else every rank."
    ),
]


def client(ctx: typer.Context, cluster: str | None) -> Client:
    """A client of the chosen cluster's daemon. Raises NotRunning, Unreachable, SelectorError."""
    from epdctl.control.cluster import find_cluster

    return find_cluster(chosen_cluster(ctx, cluster), os.environ).client


def chosen_cluster(ctx: typer.Context, cluster: str | None) -> str | None:
    """The name said after the verb, else before it, else EPDCTL_CLUSTER, else None: the only one running."""
    said_before = ctx.obj.cluster if isinstance(ctx.obj, Globals) else None
    return cluster or said_before


def topology_file(file: Path | None) -> Path:
    """Raises UserError when none was named and ./epdctl.yaml is not there."""
    from epdctl.errors import UserError

    if file is not None:
        return file
    default = Path("epdctl.yaml")
    if not default.exists():
        raise UserError(
            "no topology file was named, and there is no ./epdctl.yaml here",
            hint="`epdctl init` writes one; or name yours: `epdctl up FILE`, EPDCTL_FILE=FILE",
        )
    return default


def make_plan(ctx: typer.Context, file: Path | None, name: str | None) -> Plan:
    """The plan that ``up`` runs and ``plan`` prints. Raises TopologyError, PlacementError, UserError."""
    from epdctl.adapters import Found, make_plan
    from epdctl.control.cluster import list_clusters

    held = {port: cluster.name for cluster in list_clusters(os.environ) for port in cluster.record.ports}
    return make_plan(topology_file(file), environ=os.environ, found=Found(held=held), name=chosen_cluster(ctx, name))
