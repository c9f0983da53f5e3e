"""One daemon from its first socket to its last: puts the pieces together, runs them, and leaves nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence

from epdctl.control.handover import CUT_LOOSE
from epdctl.control.paths import Record, process_start
from epdctl.control.server import ControlServer
from epdctl.errors import EpdError
from epdctl.ids import RunId
from epdctl.launch.local import LocalLauncher
from epdctl.supervisor.commands import Commands
from epdctl.supervisor.daemon import Daemon
from epdctl.supervisor.logs import bound
from epdctl.supervisor.order import STEPS
from epdctl.supervisor.reception import Reception
from epdctl.supervisor.rundir import RunDir
from epdctl.supervisor.sweep import sweep
from epdctl.topology.plan import Plan
from epdctl.wire.message import PROTOCOL

__all__ = ["serve", "sweep_former"]

log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0
FAREWELL_SECONDS = 2.0  # for clients to read the end of their streams
LOGS_SECONDS = 60.0  # between two looks at how long the ranks' logs have become
SLACK_SECONDS = 30.0  # beyond the deadlines of the ranks, before a stop that does not end is ended


async def serve(plan: Plan, rundir: RunDir, lifeline: int | None, started: Callable[[], None]) -> None:
    """Run the cluster until it is asked to stop and has stopped; ``started`` is called when control.sock answers."""
    launcher = LocalLauncher(asyncio.get_running_loop())
    daemon = Daemon(plan, rundir, launcher)
    reception, control = Reception(daemon), ControlServer(Commands(daemon))
    keeper = asyncio.create_task(_bound_logs(rundir))
    try:
        await reception.start(rundir.directory.ranks)
        await control.start(rundir.directory.control)
        rundir.write_record(_record(plan, rundir))
        _obey_signals(daemon)
        if lifeline is not None:
            _hold(lifeline, daemon)
        daemon.start()
        started()
        await _until_settled(daemon)
    finally:
        keeper.cancel()
        await daemon.captures.close()
        await launcher.close()
        left = sweep(rundir.run, SWEEP_SECONDS)
        _report_left(daemon, left)
        rundir.release()
        daemon.events.record("down", f"{len(left)} processes are left" if left else "nothing is left of the cluster")
        daemon.events.close()
        daemon.changed.ring()
        reception.close()
        await control.close(FAREWELL_SECONDS)


def sweep_former(run: RunId) -> None:
    """End what a daemon that died left behind. Raises EpdError when it will not end."""
    left = sweep(run, SWEEP_SECONDS)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise EpdError(
            f"processes of the run {run}, whose daemon died, cannot be ended: {pids}",
            hint="a process that SIGKILL does not end hangs in the kernel, often in a GPU driver",
        )


def _record(plan: Plan, rundir: RunDir) -> Record:
    return Record(
        pid=os.getpid(),
        start_time=process_start(os.getpid()) or 0,
        run=rundir.run,
        protocol=PROTOCOL,
        state_dir=str(rundir.state.path),
        source=plan.source,
        gateway=plan.gateway_url,
        ports=plan.ports,
        ranks=[str(planned.rank) for planned in plan.ranks],
        drain_s=plan.deadlines.drain,
        kill_s=plan.deadlines.kill,
    )


def _obey_signals(daemon: Daemon) -> None:
    """The first signal drains and stops, the next one kills."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: daemon.stop(force=daemon.stopping))


def _hold(lifeline: int, daemon: Daemon) -> None:
    """Stop when the last writer of this pipe is gone: the terminal that the cluster belongs to. Unless it was cut."""
    loop = asyncio.get_running_loop()
    os.set_inheritable(lifeline, False)
    os.set_blocking(lifeline, False)

    def read() -> None:
        try:
            data = os.read(lifeline, 4096)
        except BlockingIOError:
            return
        if data and data != CUT_LOOSE:
            return
        loop.remove_reader(lifeline)
        os.close(lifeline)
        if not data:
            log.info("whoever started this cluster is gone")
            daemon.stop()

    loop.add_reader(lifeline, read)


async def _until_settled(daemon: Daemon) -> None:
    await daemon.stop_asked.wait()
    deadlines = daemon.deadlines
    limit = STEPS * (deadlines.drain + deadlines.kill) + SLACK_SECONDS
    try:
        async with asyncio.timeout(limit):
            await daemon.settled.wait()
    except TimeoutError:
        log.error("the stop did not end within %.0f s; killing what is left", limit)


async def _bound_logs(rundir: RunDir) -> None:
    while True:
        await asyncio.sleep(LOGS_SECONDS)
        try:
            bound(rundir.state.logs)
        except OSError as error:  # a full disk must not take the cluster down
            log.error("cannot bound the ranks' logs: %s", error)


def _report_left(daemon: Daemon, left: Sequence[object]) -> None:
    for process in left:
        daemon.events.record("left", f"could not be ended: {process}")
        log.error("could not be ended: %s", process)
