"""The Plan: a topology after placement. Frozen; ``plan`` prints it and ``up`` runs it, so they cannot differ."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from epdctl.ids import PhysicalGpu, RankName, Stage
from epdctl.wire.config import RankConfig

__all__ = ["Deadlines", "Plan", "PlannedRank", "RestartMode", "RestartPolicy"]


class RestartMode(enum.StrEnum):
    ALWAYS = "always"
    ON_FAILURE = "on-failure"  # an exit with status 0 that nobody asked for leaves the rank stopped
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Exponential back-off with jitter, under a budget over a sliding window. Seconds."""

    mode: RestartMode = RestartMode.ALWAYS
    initial: float = 0.5
    maximum: float = 30.0
    jitter: float = 0.2  # the delay is drawn from [1 - jitter, 1 + jitter] times itself
    budget: int = 5  # restarts within the window; one more is FAILED
    window: float = 600.0
    stable: float = 60.0  # READY this long forgives every earlier restart


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the supervisor waits for each thing. Seconds."""

    start: float = 600.0  # from spawn to Ready
    heartbeat: float = 1.0  # between two beats
    unhealthy: float = 5.0  # without a beat: UNHEALTHY, no longer routed to
    dead: float = 30.0  # without a beat: killed and restarted
    stuck: float = 120.0  # one piece of work without an end, or unhealthy without recovery: killed and restarted
    drain: float = 30.0
    kill: float = 5.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """One rank, where it runs, and the command that runs it (``argv``, ``env``: filled in by the adapter)."""

    config: RankConfig
    gpus: tuple[PhysicalGpu, ...] = ()
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)  # the whole environment of the process, less the run's id

    @property
    def rank(self) -> RankName:
        return self.config.rank

    @property
    def stage(self) -> Stage:
        return self.config.stage


@dataclass(frozen=True, slots=True)
class Plan:
    cluster: str
    source: str  # the topology file
    adapter: str
    ranks: tuple[PlannedRank, ...]
    restart: RestartPolicy
    deadlines: Deadlines
    notes: tuple[str, ...] = ()  # what was chosen on the user's behalf: "transfer: auto → zmq"

    @property
    def ports(self) -> list[int]:
        """Every TCP port that its ranks listen at."""
        gateways = [rank.config.gateway.port for rank in self.ranks if rank.stage is Stage.GATEWAY]
        surfaces = [rank.config.encoder.http for rank in self.ranks]
        return gateways + [surface.port for surface in surfaces if surface is not None]

    @property
    def gateway_url(self) -> str | None:
        for rank in self.ranks:
            if rank.stage is Stage.GATEWAY:
                return f"http://{rank.config.gateway.host}:{rank.config.gateway.port}"
        return None
