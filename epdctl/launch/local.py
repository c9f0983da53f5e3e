"""Ranks as processes of this machine, each under a guard of its own.

    this process (subreaper) ── lifeline, pidfd ── guard (subreaper) ── rank ── whatever it starts

A guard that is killed cannot clean up any more: its rank and all orphans become our children, and we end them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from epdctl.launch import procs
from epdctl.launch.base import Command, Exit, Handle
from epdctl.launch.orphans import Orphans

__all__ = ["MAX_SPEC_BYTES", "LocalHandle", "LocalLauncher"]

MAX_SPEC_BYTES = 1 << 20
CLOSE_SECONDS = 5.0  # for the guards to end their trees, and once more after the guards themselves were killed

# A file that is run, not a module that is imported: the guard loads nothing but itself.
_GUARD = Path(__file__).resolve().parent.parent / "supervisor" / "guard.py"

_log = logging.getLogger(__name__)


class LocalHandle:
    """One guard and its rank. All of it runs on the event loop."""

    def __init__(
        self, launcher: LocalLauncher, guard: subprocess.Popen[bytes], lifeline: socket.socket, mark: str
    ) -> None:
        self._launcher = launcher
        self._loop = launcher.loop
        self._guard = guard
        self._lifeline = lifeline
        self._mark = mark
        self._rank: int | None = None
        self._exit: Exit | None = None
        self._heard = b""
        self._killed = False
        self._gone = False  # the guard is reaped
        self._pidfd = procs.open_pidfd(guard.pid)  # its pid is its own: we have not reaped it
        self._born = procs.read(guard.pid)
        self._loop.add_reader(lifeline, self._listen)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._guard_ended)

    @property
    def pid(self) -> int | None:
        return self._rank

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    def signal(self, number: signal.Signals) -> None:
        """SIGTERM to the rank, or SIGKILL to all. A second SIGKILL goes to the guard too, should it be stuck."""
        if number not in (signal.SIGTERM, signal.SIGKILL):
            raise ValueError(f"a rank is sent SIGTERM or SIGKILL, not {number!r}")
        if self._gone:
            return
        if number is signal.SIGTERM:
            self._tell(b"term\n")
            return
        if self._killed or not self._tell(b"kill\n"):
            self._guard.kill()
        self._killed = True

    def _tell(self, line: bytes) -> bool:
        try:
            return self._lifeline.send(line) == len(line)
        except OSError:  # dead, which is what it is told to be, or stopped with a full buffer
            return False

    def _listen(self) -> None:
        if self._drain_lifeline():
            return
        self._loop.remove_reader(self._lifeline)
        if self._pidfd is None:  # without pidfds the end of the lifeline is the end of the guard
            self._guard_ended()

    def _drain_lifeline(self) -> bool:
        """Read what is there. False at its end."""
        while True:
            try:
                heard = self._lifeline.recv(65536)
            except BlockingIOError:
                return True
            except ConnectionError:  # killed with a word of ours unread
                return False
            if not heard:
                return False
            *lines, self._heard = (self._heard + heard).split(b"\n")
            for line in lines:
                self._note(line.decode(errors="replace"))

    def _note(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        match word:
            case "spawned":
                self._rank = int(rest)
            case "exited":
                self._exit = Exit(int(rest))
            case "failed":
                self._exit = Exit(127, error=f"could not be started: {rest}")
            case _:
                _log.warning("guard %d said %r, which means nothing; ignored", self._guard.pid, line)

    def _guard_ended(self) -> None:
        self._drain_lifeline()
        self._release()
        code = self._guard.wait()  # it has ended: this reaps and returns at once
        self._gone = True
        if self._exit is not None:
            self._finish(self._exit)
            return
        _log.warning("guard %d of rank process %s died (%d); ending its orphans", self._guard.pid, self._rank, code)
        since = self._born.start_time if self._born else 0
        Orphans(self._loop, self._mark, since, self._launcher.owns, lambda: self._finish(Exit(code, by="guard"))).hunt()

    def _release(self) -> None:
        self._loop.remove_reader(self._lifeline)
        self._lifeline.close()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _finish(self, exit: Exit) -> None:
        self._rank = None
        self._launcher.finished(self, exit)


class LocalLauncher:
    """Launches on this machine, from the thread of ``loop``: a guard dies with the thread that started it.

    Makes the calling process a subreaper. ``grace`` seconds are what a rank has between SIGTERM and SIGKILL when its
    owner is lost.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, grace: float = 1.0) -> None:
        self.loop = loop
        self._grace = grace
        self._running: dict[LocalHandle, Callable[[Exit], None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        if not procs.become_subreaper():
            _log.warning("this system has no subreaper: a killed guard's orphans are found by the sweep only")

    def launch(self, command: Command, ended: Callable[[Exit], None]) -> Handle:
        """See Launcher. A command that cannot be executed ends with ``Exit.error`` set, as an exec fails late."""
        if len(command.spec) > MAX_SPEC_BYTES:
            raise OSError(
                errno.E2BIG, f"the spec has {len(command.spec)} bytes; at most {MAX_SPEC_BYTES} are passed on"
            )
        mark = secrets.token_hex(8)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                guard = self._start(command, theirs, mark)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        handle = LocalHandle(self, guard, ours, mark)
        self._running[handle] = ended
        self._idle.clear()
        return handle

    def _start(self, command: Command, lifeline: socket.socket, mark: str) -> subprocess.Popen[bytes]:
        keeper = [sys.executable, "-I", "-S", str(_GUARD), str(lifeline.fileno()), str(self._grace)]
        with contextlib.ExitStack() as stack:
            spec = _memory_file(command.spec)
            stack.callback(os.close, spec)
            log = os.open(command.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, log)
            return subprocess.Popen(
                [*keeper, *command.argv],
                env={**command.env, procs.GUARD_MARK: mark},
                stdin=spec,
                stdout=log,
                stderr=log,
                pass_fds=(lifeline.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which stops ranks in order
            )

    def owns(self, pid: int) -> bool:
        """Whether ``pid`` is a guard of ours, and so no orphan."""
        return any(handle.guard_pid == pid for handle in self._running)

    def finished(self, handle: LocalHandle, exit: Exit) -> None:
        ended = self._running.pop(handle)
        if not self._running:
            self._idle.set()
        ended(exit)

    async def close(self) -> None:
        """Kill whatever is left; returns when all of it is gone, or after two deadlines with an error in the log."""
        for _ in range(2):
            for handle in list(self._running):
                handle.signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), CLOSE_SECONDS)
                return
        left = ", ".join(str(handle.guard_pid) for handle in self._running)
        _log.error("the guards %s and their ranks did not end within %g s of SIGKILL", left, 2 * CLOSE_SECONDS)


def _memory_file(content: bytes) -> int:
    """A file without a name: read to its end like a pipe, but never full, so that nobody waits to write it."""
    fd = os.memfd_create("spec", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
