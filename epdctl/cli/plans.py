"""A Plan as text. Pure: nothing here prints."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence

from epdctl.ids import Stage
from epdctl.topology.plan import Deadlines, Plan, PlannedRank

__all__ = ["plan_lines"]

_WITH_KV = frozenset({Stage.PREFILL, Stage.DECODE, Stage.LANGUAGE, Stage.MONO})


def plan_lines(plan: Plan) -> Iterator[str]:
    """The cluster, the environment that all ranks have in common, then each rank: each could be run by hand."""
    yield f"cluster   {plan.cluster}"
    yield f"source    {plan.source}"
    yield f"adapter   {plan.adapter}"
    yield f"gateway   {plan.gateway_url or '(none)'}"
    policy = plan.restart
    yield f"restart   {policy.mode}, at most {policy.budget} in {policy.window:g} s"
    yield f"deadlines {_deadlines(plan.deadlines)}"
    shared = shared_environment(plan.ranks)
    yield "every rank"
    yield from _env_lines(shared)
    for planned in plan.ranks:
        yield ""
        yield from rank_lines(planned, shared)


def shared_environment(ranks: Sequence[PlannedRank]) -> dict[str, str]:
    """What every rank's environment has, with the same value."""
    if not ranks:
        return {}
    first, *rest = ranks
    return {name: value for name, value in first.env.items() if all(other.env.get(name) == value for other in rest)}


def rank_lines(planned: PlannedRank, shared: Mapping[str, str]) -> Iterator[str]:
    config = planned.config
    yield str(planned.rank)
    yield f"  gpus     {_gpus(planned)}"
    yield f"  threads  {config.threads}"
    if planned.stage in _WITH_KV:
        yield f"  kv       {config.engine.kv_tokens} tokens, pages of {config.engine.page_size}"
    yield f"  ports    {_ports(planned)}"
    yield f"  model    {config.model.path} ({config.model.dtype}), service {config.service}"
    yield f"  command  {shlex.join(planned.argv)}"
    yield from _env_lines({name: value for name, value in planned.env.items() if name not in shared})


def _env_lines(env: Mapping[str, str]) -> Iterator[str]:
    return (f"  env      {name}={shlex.quote(value)}" for name, value in sorted(env.items()))


def _gpus(planned: PlannedRank) -> str:
    if not planned.gpus:
        return "none (CPU)"
    names = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in planned.gpus)
    config = planned.config
    if config.share == 1.0:
        return names
    bound = f": {config.memory_bytes / 2**30:.1f} GiB" if config.memory_bytes else ""
    return f"{names}, share {config.share:g}{bound}"


def _ports(planned: PlannedRank) -> str:
    config = planned.config
    if planned.stage is Stage.GATEWAY:
        return f"{config.gateway.host}:{config.gateway.port}"
    surface = config.encoder.http
    return "none (unix sockets)" if surface is None else f"{surface.host}:{surface.port}"


def _deadlines(deadlines: Deadlines) -> str:
    return ", ".join(f"{name} {seconds:g} s" for name, seconds in dataclasses.asdict(deadlines).items())
