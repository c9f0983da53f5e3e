"""The keeper of one rank: starts it, ends it with everything it started, and dies with its owner.

Run as ``python -I -S guard.py LIFELINE_FD GRACE COMMAND…``. Standard library only, nothing of epdctl, so that it is up
in milliseconds. Its standard input becomes the rank's; its outputs are the rank's log.

It says, on the lifeline:  ``spawned PID`` · ``exited CODE`` (minus a signal's number) · ``failed TEXT`` (no rank)
It is told:                ``term`` (SIGTERM to the rank) · ``kill`` (SIGKILL to all)
End of the lifeline, or a SIGTERM to the guard, means: SIGTERM to the rank, GRACE seconds, SIGKILL to all.

Every descendant ends up as a child of this process (it is a subreaper), so all of them belong to it to reap, and one
``waitpid`` for any child, woken by SIGCHLD, sees every death. Only when no child is left has the rank ended.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESCAN = 0.05  # while killing: a process may have forked between the look and the signal


def say(text: str) -> None:
    sys.stderr.write(f"guard: {text}\n")
    sys.stderr.flush()


def prctl(option: int, value: int) -> bool:
    try:
        import ctypes

        result: int = ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
        return result == 0
    except (ImportError, OSError, AttributeError):
        return False


def parents() -> dict[int, int]:
    """Parent of every process there is. (``/proc/PID/task/*/children`` is not compiled into every kernel.)"""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    found[int(entry)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
    return found


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    found = list(children.get(root, []))
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, []))
    return found


def become(command: list[str], guard: int, report: int) -> None:
    """In the child: turn into the rank, or say why not. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (*ENDING, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:  # else it died before the line above took effect
            os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        os.write(report, f"{command[0]}: {getattr(error, 'strerror', None) or error}".encode()[:4096])
    finally:
        os._exit(127)


class Guard:
    def __init__(self, lifeline: socket.socket, grace: float) -> None:
        self.lifeline = lifeline
        self.grace = grace
        self.owned = True  # somebody holds the other end
        self.rank = 0  # pid; stays unreaped, hence its own, until code is set
        self.code: int | None = None
        self.kill_at: float | None = None  # monotonic
        self.left = True  # some child is not reaped yet
        self.heard = b""
        self.refused: set[int] = set()
        self.wakeup = _wakeup()

    def spawn(self, command: list[str]) -> None:
        guard = os.getpid()
        report, at_exec = os.pipe()  # both close on exec: end of file without a word means that the rank runs
        self.rank = os.fork()
        if self.rank == 0:
            become(command, guard, at_exec)
        os.close(at_exec)
        with open(report, "rb") as told:
            failure = told.read()
        if failure:
            os.waitpid(self.rank, 0)
            self.tell("failed " + " ".join(failure.decode(errors="replace").split()))
            os._exit(0)
        self.tell(f"spawned {self.rank}")

    def run(self) -> None:
        """Returns when the rank and all it started are reaped."""
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        poll.register(self.lifeline, select.POLLIN)
        self.reap()
        while self.left:
            if self.code is not None or self.overdue():
                self.kill_all()
            for fd, _ in poll.poll(self.wait_ms()):
                if fd == self.wakeup.fileno():
                    self.signalled()
                elif not self.listen():
                    poll.unregister(self.lifeline)
            self.reap()
        self.tell(f"exited {self.code}")

    def reap(self) -> None:
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.rank:
                    self.code = os.waitstatus_to_exitcode(found[1])
        except ChildProcessError:
            self.left = False

    def overdue(self) -> bool:
        return self.kill_at is not None and time.monotonic() >= self.kill_at

    def wait_ms(self) -> float | None:
        if self.code is not None or self.overdue():
            return RESCAN * 1000
        return None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic()) * 1000 + 1

    def signalled(self) -> None:
        numbers = self.wakeup.recv(4096)
        if any(number in numbers for number in ENDING):
            self.end()

    def listen(self) -> bool:
        """False at the end of the lifeline."""
        try:
            heard = self.lifeline.recv(4096)
        except OSError:
            heard = b""
        if not heard:
            self.owned = False
            self.end()
            return False
        *lines, self.heard = (self.heard + heard).split(b"\n")
        for line in lines:
            self.obey(line)
        return True

    def obey(self, line: bytes) -> None:
        if line == b"term":
            self.signal_rank(signal.SIGTERM)
        elif line == b"kill":
            self.kill_at = time.monotonic()
        else:
            say(f"not understood and ignored: {line[:80]!r}")

    def end(self) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + self.grace
            self.signal_rank(signal.SIGTERM)

    def signal_rank(self, number: int) -> None:
        if self.code is None:
            self.send(self.rank, number)

    def kill_all(self) -> None:
        for pid in descendants(os.getpid()):
            self.send(pid, signal.SIGKILL)

    def send(self, pid: int, number: int) -> None:
        """A descendant's pid is its own until we reap it, so this never hits a stranger among our children."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            if pid not in self.refused:
                self.refused.add(pid)
                say(f"process {pid} changed its user and may not be signalled; waiting for its own end")

    def tell(self, line: str) -> None:
        if not self.owned:
            return
        try:
            self.lifeline.sendall(line.encode() + b"\n")
        except OSError:  # the owner is gone; its end of file comes next
            self.owned = False


def _wakeup() -> socket.socket:
    """Every signal we care for becomes a byte here, so that one poll waits for all there is."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in (*ENDING, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reader


def main() -> None:
    lifeline = socket.socket(fileno=int(sys.argv[1]))
    lifeline.set_inheritable(False)
    if not prctl(PR_SET_CHILD_SUBREAPER, 1):
        say("this system has no subreaper: what the rank starts in a session of its own may outlive it")
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a second line; the lifeline is the first
    guard = Guard(lifeline, float(sys.argv[2]))
    guard.spawn(sys.argv[3:])
    guard.run()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
