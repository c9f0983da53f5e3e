"""How fast the supervisor notices, restarts and cleans up, with a real daemon and idle ranks of its own."""

from __future__ import annotations

import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epdctl.bench.clusters import GUARD_SECONDS, Say, await_ready, environment, kill, running
from epdctl.control.client import Client
from epdctl.errors import DeadlineExceeded, EpdError, RankFailed
from epdctl.ids import RankName, Stage
from epdctl.supervisor.sweep import find
from epdctl.topology.plan import Deadlines, Plan, PlannedRank, RestartPolicy
from epdctl.wire.config import ModelConfig, RankConfig
from epdctl.wire.control import Event, RankState

__all__ = ["Figures", "Report", "measure"]

RANKS = 4


class Figures(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figures:
        return cls(p50=round(statistics.median(samples) * 1000, 1), max=round(max(samples) * 1000, 1))


class Report(msgspec.Struct, frozen=True):
    """``detect``: SIGKILL of a rank until a follower of the event log reads its exit. ``ready``: until its next
    process is READY. ``gone``: SIGKILL of the daemon until no process of the run is left, ``setsid`` grandchildren
    included. ``cli``: the whole process of ``epdctl --help``."""

    schema: int
    kills: int
    ranks: int
    cpus: int
    detect_ms: Figures
    ready_ms: Figures
    gone_ms: Figures
    cli_ms: Figures


@dataclass(frozen=True, slots=True)
class Heard:
    """An event and when it was read here, on this process's monotonic clock."""

    at: float
    event: Event


def measure(kills: int, say: Say) -> Report:
    """Kill ranks, then daemons, ``kills`` times each. Raises DeadlineExceeded when something does not come."""
    with tempfile.TemporaryDirectory(prefix="epdctl-bench-", ignore_cleanup_errors=True) as folder:
        environ = environment(Path(folder))
        detect, ready = _kill_ranks(kills, environ, say)
        gone = [_kill_daemon(environ, say) for _ in range(kills)]
        cli = [_time_help(environ) for _ in range(kills)]
    return Report(
        schema=1,
        kills=kills,
        ranks=RANKS,
        cpus=os.cpu_count() or 1,
        detect_ms=Figures.of(detect),
        ready_ms=Figures.of(ready),
        gone_ms=Figures.of(gone),
        cli_ms=Figures.of(cli),
    )


def bench_plan(environ: dict[str, str], ranks: int = RANKS) -> Plan:
    """Idle ranks, restarted without delay and without end: a back-off would be all that one measures."""
    return Plan(
        cluster="bench",
        source="(bench supervisor)",
        adapter="bench",
        ranks=tuple(_idle_rank(replica, environ) for replica in range(ranks)),
        restart=RestartPolicy(initial=0.001, maximum=0.001, jitter=0.0, budget=1_000_000),
        deadlines=Deadlines(),
    )


def _idle_rank(replica: int, environ: dict[str, str]) -> PlannedRank:
    config = RankConfig(
        rank=RankName.of(Stage.ENCODER, replica),
        stage=Stage.ENCODER,
        service="epdctl.bench.idle:Idle",
        model=ModelConfig(path="/", name="idle", family="none"),
    )
    return PlannedRank(config=config, argv=(sys.executable, "-m", "epdctl.rank"), env=environ)


def _kill_ranks(kills: int, environ: dict[str, str], say: Say) -> tuple[list[float], list[float]]:
    detect, ready = [], []
    with running(bench_plan(environ), environ) as daemon:
        client = daemon.cluster.client
        await_ready(client)
        heard = _listen(client)
        for number in range(kills):
            rank = RankName.of(Stage.ENCODER, number % RANKS)
            noticed, again = _kill_rank(client, rank, heard)
            say(f"kill {number + 1} of {kills}: {rank} noticed {noticed * 1000:.1f} ms, ready {again * 1000:.0f} ms")
            detect.append(noticed)
            ready.append(again)
    return detect, ready


def _kill_rank(client: Client, rank: RankName, heard: queue.Queue[Heard]) -> tuple[float, float]:
    """Seconds from the kill to the exit in the event log, and to READY again."""
    status = next(status for status in client.status().ranks if status.rank == rank)
    if status.pid is None:
        raise RankFailed(rank, f"it has no process: {status.state}, {status.reason}")
    began = time.monotonic()
    os.kill(status.pid, signal.SIGKILL)
    noticed = _await_event(heard, lambda event: event.rank == rank and event.kind == "exit")
    again = _await_event(heard, lambda event: event.rank == rank and event.state is RankState.READY)
    return noticed - began, again - began


def _listen(client: Client) -> queue.Queue[Heard]:
    heard: queue.Queue[Heard] = queue.Queue()

    def follow() -> None:
        try:
            for event in client.events(follow=True, tail=0):
                heard.put(Heard(time.monotonic(), event))
        except EpdError:  # the daemon went down: the end of this measurement
            return

    threading.Thread(target=follow, daemon=True).start()
    return heard


def _await_event(heard: queue.Queue[Heard], wanted: Callable[[Event], bool]) -> float:
    deadline = time.monotonic() + GUARD_SECONDS
    while True:
        try:
            item = heard.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise DeadlineExceeded(f"the daemon's event log did not say so within {GUARD_SECONDS:.0f} s") from None
        if wanted(item.event):
            return item.at


def _kill_daemon(environ: dict[str, str], say: Say) -> float:
    """Seconds from the daemon's SIGKILL until nothing that carries the run's id is alive."""
    with running(bench_plan(environ), environ) as daemon:
        await_ready(daemon.cluster.client)
        run = daemon.cluster.record.run
        before = len(find(run))
        began = time.monotonic()
        kill(daemon.pid)
        while find(run):
            if time.monotonic() - began > GUARD_SECONDS:
                raise DeadlineExceeded(f"processes of {run} are alive {GUARD_SECONDS:.0f} s after their daemon")
        took = time.monotonic() - began
    say(f"daemon killed: {before} processes gone in {took * 1000:.0f} ms")
    return took


def _time_help(environ: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "epdctl", "--help"],
        env=environ, stdout=subprocess.DEVNULL, check=True, timeout=GUARD_SECONDS,
    )  # fmt: skip
    return time.monotonic() - began
