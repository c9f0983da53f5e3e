"""What a scripted child's tree tells: who is there, and the moment when nobody is any more."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from types import TracebackType

__all__ = ["HANG", "SCRIPTED_CHILD", "Report", "children", "descriptors"]

SCRIPTED_CHILD = Path(__file__).with_name("scripted_child.py")
HANG = 60.0  # seconds; only so that a broken build fails instead of hanging


class Report:
    """The reading end of the FIFO. End of file comes when the last process that held it is dead."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "report"
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self._text = ""
        self._ended = False

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)

    def child(self, *options: str) -> list[str]:
        """The command line of a scripted child that reports here."""
        return [sys.executable, "-I", "-S", str(SCRIPTED_CHILD), "--report", str(self.path), *options]

    def wait_for(self, count: int) -> dict[str, int]:
        """Pid by role, once ``count`` processes have reported."""
        while self._text.count("\n") < count:
            assert not self._ended, f"the tree ended after {self._text!r}"
            self._read()
        return {role: int(pid) for role, pid in (line.split() for line in self._text.splitlines())}

    def wait_end(self) -> None:
        """Returns when every process of the tree is dead."""
        while not self._ended:
            self._read()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(HANG * 1000), f"nothing more came within {HANG:g} s: {self._text!r}"
        heard = os.read(self._fd, 65536)
        self._text += heard.decode()
        self._ended = not heard


def children() -> set[int]:
    """Our children, zombies included."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(entry))
    return found


def descriptors() -> set[str]:
    """What each open descriptor of ours is, the one that looks excepted."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}")
        except OSError:
            continue
    return found
