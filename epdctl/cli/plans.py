"""A Plan as text. Pure: nothing here prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from epdctl.topology.plan import Plan, PlannedRank

__all__ = ["plan_lines"]


def plan_lines(plan: Plan) -> Iterator[str]:
    """The cluster, then for each rank its place, its environment and its command: each could be run by hand."""
    yield f"cluster   {plan.cluster}"
    yield f"source    {plan.source}"
    yield f"adapter   {plan.adapter}"
    yield f"gateway   {plan.gateway_url or '(none)'}"
    policy = plan.restart
    yield f"restart   {policy.mode}, at most {policy.budget} in {policy.window:g} s"
    for planned in plan.ranks:
        yield ""
        yield from rank_lines(planned)


def rank_lines(planned: PlannedRank) -> Iterator[str]:
    config = planned.config
    yield str(planned.rank)
    yield f"  gpus     {_gpus(planned)}"
    yield f"  threads  {config.threads}"
    yield f"  ports    {_ports(planned)}"
    yield f"  model    {config.model.path} ({config.model.dtype}), service {config.service}"
    yield f"  command  {shlex.join(planned.argv)}"
    for name, value in sorted(planned.env.items()):
        yield f"  env      {name}={shlex.quote(value)}"


def _gpus(planned: PlannedRank) -> str:
    if not planned.gpus:
        return "none (CPU)"
    names = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in planned.gpus)
    return names if planned.config.share == 1.0 else f"{names}, share {planned.config.share:g}"


def _ports(planned: PlannedRank) -> str:
    from epdctl.ids import Stage

    if planned.stage is not Stage.GATEWAY:
        return "none (unix sockets)"
    return f"{planned.config.gateway.host}:{planned.config.gateway.port}"
