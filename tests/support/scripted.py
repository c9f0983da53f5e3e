"""Plans of scripted ranks, and a cluster of them: a real daemon with real children and no model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

import epdctl
from epdctl.control.client import Client
from epdctl.control.cluster import DaemonProcess, start_daemon
from epdctl.control.paths import RunState
from epdctl.ids import RankName
from epdctl.topology.plan import Deadlines, Plan, PlannedRank, RestartPolicy
from epdctl.wire.config import GatewayConfig, ModelConfig, RankConfig
from epdctl.wire.control import Event, FollowLogs, RankState, RankStatus, StatusReply
from tests.support.scripted_rank import Fact, Script, facts_of

__all__ = ["PATIENT", "Cluster", "scripted_plan"]

# Nothing in a test waits for these to pass unless it is about them.
PATIENT = Deadlines(start=60.0, heartbeat=0.05, unhealthy=60.0, dead=120.0, drain=60.0, kill=60.0)
PROMPT = RestartPolicy(initial=0.01, maximum=0.05, budget=3)

_ROOT = Path(epdctl.__file__).parent.parent
_MODEL = ModelConfig(path="/nowhere", name="scripted", family="qwen2_5_vl")

Scripts = Mapping[str, Script | Sequence[Script]]


def scripted_plan(
    scripts: Scripts,
    *,
    cluster: str = "scripted",
    deadlines: Deadlines = PATIENT,
    restart: RestartPolicy = PROMPT,
    gang: Sequence[str] = (),
    port: int = 1,
) -> Plan:
    """One rank per entry; the ranks in ``gang`` start and die together."""

    def planned(name: str, script: Script | Sequence[Script]) -> PlannedRank:
        rank = RankName(name)
        config = RankConfig(
            rank=rank,
            stage=rank.stage,
            service="none:none",
            model=_MODEL,
            gang="gang" if name in gang else None,
            gateway=GatewayConfig(port=port),
            heartbeat_seconds=deadlines.heartbeat,
        )
        entries = [script] if isinstance(script, Script) else list(script)
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(_ROOT),
            "EPDCTL_SCRIPT": msgspec.json.encode(entries).decode(),
        }
        return PlannedRank(config=config, argv=(sys.executable, "-m", "tests.support.scripted_rank"), env=env)

    ranks = tuple(planned(name, script) for name, script in scripts.items())
    return Plan(
        cluster=cluster, source="test.yaml", adapter="native", ranks=ranks, restart=restart, deadlines=deadlines
    )


@dataclass
class Cluster:
    """A running daemon and what tests ask of it. Every wait is for a fact that the daemon tells."""

    daemon: DaemonProcess
    facts_dir: Path
    ended: bool = field(default=False)

    @property
    def client(self) -> Client:
        return self.daemon.cluster.client

    @property
    def state(self) -> RunState:
        return self.daemon.cluster.state

    def until(self, what: Callable[[StatusReply], bool]) -> StatusReply:
        """The first status for which ``what`` holds."""
        for status in self.client.watch():
            if what(status):
                return status
        raise AssertionError("the cluster went down before that came true")

    def until_rank(self, rank: str, state: RankState, incarnation: int | None = None) -> RankStatus:
        def there(status: StatusReply) -> bool:
            found = find(status, rank)
            return found.state is state and incarnation in (None, found.incarnation)

        return find(self.until(there), rank)

    def until_ready(self) -> StatusReply:
        return self.until(lambda status: all(rank.state is RankState.READY for rank in status.ranks))

    def until_event(self, what: Callable[[Event], bool]) -> Event:
        return next(event for event in self.client.events(follow=True) if what(event))

    def rank(self, name: str) -> RankStatus:
        return find(self.client.status(), name)

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.client.events() if event.kind == kind]

    def facts(self, rank: str, name: str | None = None) -> list[Fact]:
        found = facts_of(self.facts_dir / RankName(rank).file_stem)
        return [fact for fact in found if name in (None, fact.name)]

    def lines(self, *ranks: str, previous: bool = False, tail: int | None = None) -> list[tuple[int, str]]:
        command = FollowLogs(ranks=list(ranks), previous=previous, tail=tail)
        return [(line.incarnation, line.text) for line in self.client.logs(command)]

    def kill(self, rank: str) -> None:
        pid = self.rank(rank).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def down(self, *, force: bool = False) -> list[Event]:
        events = list(self.client.down(force=force))
        assert self.wait() == 0
        return events

    def wait(self) -> int:
        """The exit status of the daemon, once it has ended."""
        code = self.daemon.wait()
        self.ended = True
        return code

    def stop(self) -> None:
        """Whatever state the test has left it in."""
        if not self.ended:
            os.kill(self.daemon.pid, signal.SIGTERM)
            os.kill(self.daemon.pid, signal.SIGINT)  # two of the same kind might arrive as one
            self.wait()


def find(status: StatusReply, rank: str) -> RankStatus:
    return next(found for found in status.ranks if found.rank == rank)


def with_facts(scripts: Scripts, folder: Path) -> Scripts:
    """Each script with a facts file of its rank."""

    def noted(name: str, script: Script) -> Script:
        return msgspec.structs.replace(script, facts=str(folder / RankName(name).file_stem))

    return {
        name: [noted(name, entry) for entry in ([script] if isinstance(script, Script) else script)]
        for name, script in scripts.items()
    }


def start(plan: Plan, environ: Mapping[str, str], facts_dir: Path, lifeline: int | None = None) -> Cluster:
    return Cluster(start_daemon(plan, lifeline=lifeline, environ=environ), facts_dir)


def shorter(deadlines: Deadlines = PATIENT, **changes: float) -> Deadlines:
    """PATIENT but for the deadline that the test is about."""
    return replace(deadlines, **changes)
