"""Which cluster is meant, which there are, and starting the daemon of a new one."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from epdctl.control.client import Client, refused_error
from epdctl.control.handover import HANDOVER, OUTCOME, Handover
from epdctl.control.logfiles import tail
from epdctl.control.paths import (
    ClusterDir,
    Record,
    RunState,
    cluster_dirs,
    runs_of,
    runtime_base,
    state_base,
)
from epdctl.control.select import did_you_mean
from epdctl.errors import AlreadyRunning, EpdError, NotRunning, SelectorError, Unreachable, UserError
from epdctl.ids import new_run_id
from epdctl.topology.names import check_name
from epdctl.topology.plan import Plan
from epdctl.wire.control import Refused

__all__ = ["ClusterRef", "DaemonProcess", "find_cluster", "last_run", "list_clusters", "start_daemon"]

START_SECONDS = 60.0  # until the control socket answers; a sweep of what an earlier daemon left may come first
REAP_SECONDS = 5.0
LIFELINE_FD = 3
LOG_TAIL = 20


@dataclass(frozen=True, slots=True)
class ClusterRef:
    """One cluster whose daemon is alive."""

    directory: ClusterDir
    record: Record

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def state(self) -> RunState:
        return RunState(Path(self.record.state_dir))

    @property
    def client(self) -> Client:
        return Client(self.directory.control)


@dataclass(frozen=True, slots=True)
class DaemonProcess:
    """A daemon that this process started, and therefore has to reap if it outlives it."""

    pid: int
    cluster: ClusterRef

    def wait(self) -> int:
        """Block until the daemon has ended; its exit status, or minus the signal's number."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def list_clusters(environ: Mapping[str, str]) -> list[ClusterRef]:
    """Every cluster of this user whose daemon is alive, by name."""
    return [found for directory in cluster_dirs(environ) if (found := _ref(directory)) is not None]


def find_cluster(name: str | None, environ: Mapping[str, str]) -> ClusterRef:
    """The cluster called ``name``, else EPDCTL_CLUSTER, else the only one running.

    Raises NotRunning, or SelectorError when there are several to choose from.
    """
    running = list_clusters(environ)
    chosen = name or environ.get("EPDCTL_CLUSTER")
    if chosen:
        return _named(check_name(chosen), running)
    if len(running) > 1:
        names = ", ".join(cluster.name for cluster in running)
        raise SelectorError(f"several clusters are running: {names}", hint="choose one with --cluster NAME")
    if not running:
        raise _nothing_runs(environ)
    return running[0]


def _nothing_runs(environ: Mapping[str, str]) -> NotRunning:
    dead = [directory.name for directory in cluster_dirs(environ) if not directory.running]
    if not dead:
        return NotRunning("no cluster is running", hint="start one with: epdctl up FILE")
    return NotRunning(
        f"no cluster is running; the daemon of {', '.join(dead)} died without cleaning up",
        hint=f"epdctl down clears what it left; epdctl --cluster {dead[0]} logs has what its ranks wrote",
    )


def last_run(name: str, environ: Mapping[str, str]) -> RunState:
    """What the newest run of ``name`` left. Raises NotRunning when nothing is kept."""
    runs = runs_of(name, environ)
    if not runs:
        raise NotRunning(f"no run of {name!r} is kept under {state_base(environ)}")
    return runs[0]


def start_daemon(
    plan: Plan,
    *,
    lifeline: int | None = None,
    environ: Mapping[str, str] | None = None,
    python: Sequence[str] = (sys.executable,),
) -> DaemonProcess:
    """Start the daemon of ``plan`` in a session of its own and return when its control socket answers.

    ``lifeline`` is the read end of a pipe: when its last writer is gone the daemon drains and stops.
    ``environ`` is the daemon's environment, the caller's by default.
    Raises AlreadyRunning, or the error that kept the daemon from starting.
    """
    env = dict(os.environ if environ is None else environ)
    directory = ClusterDir(runtime_base(env) / check_name(plan.cluster))
    _refuse_second(directory)
    handover = Handover(plan=plan, run=(run := new_run_id()), state_dir=str(state_base(env) / plan.cluster / run))
    state = RunState(Path(handover.state_dir))
    _make_state(state)
    argv = [*python, "-m", "epdctl.supervisor", "--cluster", plan.cluster]
    with _spawned(argv, env, state, lifeline) as (pid, speak, answer):
        try:
            _hand_over(speak, HANDOVER.encode(handover))
            _read_outcome(answer, state)
            return DaemonProcess(pid, _started_ref(directory))
        except EpdError:
            _abandon(pid, state)
            raise


def _make_state(state: RunState) -> None:
    try:
        state.path.mkdir(parents=True, mode=0o700)
        state.logs.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(
            f"cannot make {state.path}, where logs and events are kept: {error.strerror}",
            hint="set EPDCTL_STATE_DIR to a directory that you can write to",
        ) from error


def _ref(directory: ClusterDir) -> ClusterRef | None:
    record = directory.read_record() if directory.running else None
    return None if record is None else ClusterRef(directory, record)


def _named(name: str, running: Sequence[ClusterRef]) -> ClusterRef:
    for cluster in running:
        if cluster.name == name:
            return cluster
    names = [cluster.name for cluster in running]
    hint = did_you_mean(name, names) if names else "start it with: epdctl up FILE"
    raise NotRunning(f"no cluster called {name!r} is running", hint=hint)


def _refuse_second(directory: ClusterDir) -> None:
    """The early and friendly answer; the lock is what really keeps a second daemon out."""
    holder = directory.holder()
    if holder is not None and holder.alive:
        raise AlreadyRunning(
            f"the cluster {directory.name!r} is already up (pid {holder.pid})",
            hint=f"look at it with: epdctl --cluster {directory.name} status; another needs its own --name and ports",
        )


def _started_ref(directory: ClusterDir) -> ClusterRef:
    found = _ref(directory)
    if found is None:
        raise Unreachable(f"the daemon of {directory.name!r} started and is gone again")
    return found


@contextlib.contextmanager
def _spawned(
    argv: list[str], env: Mapping[str, str], state: RunState, lifeline: int | None
) -> Iterator[tuple[int, BinaryIO, BinaryIO]]:
    """The pid, the pipe to its standard input and the pipe from its standard output."""
    stdin, speak = os.pipe()
    answer, stdout = os.pipe()
    stderr = os.open(state.daemon_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    moves = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((stdin, stdout, stderr))]
    if lifeline is not None:
        moves.append((os.POSIX_SPAWN_DUP2, lifeline, LIFELINE_FD))
        argv = [*argv, "--lifeline", str(LIFELINE_FD)]
    with os.fdopen(speak, "wb") as to_daemon, os.fdopen(answer, "rb") as from_daemon:
        try:
            # A session of its own: Ctrl-C in the terminal is the CLI's to interpret.
            # The pid alone: nobody has to keep an object alive for a daemon that outlives its starter.
            pid = os.posix_spawn(argv[0], argv, env, file_actions=moves, setsid=True, setsigdef=_ALL_DEFAULT)
        finally:
            for fd in (stdin, stdout, stderr):
                os.close(fd)
        yield pid, to_daemon, from_daemon


_ALL_DEFAULT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD)


def _hand_over(pipe: BinaryIO, data: bytes) -> None:
    """Write everything and close. A daemon that died meanwhile shows when its answer is read.

    Raises Unreachable when the daemon does not read: a pipe holds 64 KiB, the plan of many ranks more.
    """
    deadline = time.monotonic() + START_SECONDS
    os.set_blocking(pipe.fileno(), False)
    with contextlib.suppress(BrokenPipeError), pipe:
        while data:
            if not select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))[1]:
                raise Unreachable(f"the daemon did not read its plan within {START_SECONDS:.0f} s of its start")
            data = data[os.write(pipe.fileno(), data) :]


def _read_outcome(pipe: BinaryIO, state: RunState) -> None:
    outcome = _read_all(pipe.fileno())
    if not outcome:
        last = "\n".join(tail(state.daemon_log, LOG_TAIL))
        raise EpdError(f"the daemon ended before it could serve:\n{last}" if last else "the daemon ended at once")
    decoded = OUTCOME.decode(outcome)
    if isinstance(decoded, Refused):
        raise refused_error(decoded)


def _read_all(fd: int) -> bytes:
    deadline = time.monotonic() + START_SECONDS
    data = b""
    while True:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([fd], [], [], left)[0]:
            raise Unreachable(f"the daemon did not answer within {START_SECONDS:.0f} s of its start")
        block = os.read(fd, 65_536)
        if not block:
            return data
        data += block


def _abandon(pid: int, state: RunState) -> None:
    """End and reap a daemon that did not start; its reason has been told, so its empty run need not be kept."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + REAP_SECONDS
    while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:  # it may hang in the kernel
        time.sleep(0.01)
    if not state.events.exists():
        shutil.rmtree(state.path, ignore_errors=True)
