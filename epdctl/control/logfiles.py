"""Log files, one per incarnation of a rank and one of the daemon: their names, and reading their last lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epdctl.ids import Incarnation, RankName, Stage

__all__ = ["DAEMON", "LogFile", "last_bytes", "log_files", "log_path", "tail"]

DAEMON = "daemon"  # whose log is no rank's
_FILE = re.compile(r"^(?P<stage>[a-z-]+)-(?P<place>\d+(?:\.\d+)?)\.(?P<incarnation>\d+)\.log$")
_BLOCK = 64 << 10
_LONGEST_TAIL = 4 << 20  # bytes read backwards at most, however many lines were asked for


@dataclass(frozen=True, slots=True, order=True)
class LogFile:
    """``rank``: its name, or DAEMON."""

    rank: str
    incarnation: Incarnation
    path: Path


def log_path(directory: Path, rank: RankName, incarnation: Incarnation) -> Path:
    return directory / f"{rank.file_stem}.{incarnation}.log"


def log_files(directory: Path) -> list[LogFile]:
    """Every log file there, the daemon's and those of ranks by incarnation; other files are left out."""
    return sorted(_parse(directory))


def _parse(directory: Path) -> Iterator[LogFile]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        match = _FILE.match(name)
        if name == f"{DAEMON}.log":
            yield LogFile(DAEMON, Incarnation(1), directory / name)
        elif match is not None and match["stage"] in set(Stage):
            rank = RankName(f"{match['stage']}/{match['place']}")
            yield LogFile(rank, Incarnation(int(match["incarnation"])), directory / name)


def tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` lines; an empty list when there is no such file."""
    data, _ = last_bytes(path, lines)
    return data.decode(errors="replace").splitlines()


def last_bytes(path: Path, lines: int) -> tuple[bytes, int]:
    """What holds the last ``lines`` lines, and the offset it ends at; nothing when there is no such file."""
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            return _backwards(file.fileno(), end, lines), end
    except FileNotFoundError:
        return b"", 0


def _backwards(fd: int, end: int, lines: int) -> bytes:
    data = b""
    position = end
    # One newline more than lines are wanted: it ends the line before them.
    while position > 0 and data.count(b"\n") <= lines and end - position < _LONGEST_TAIL:
        start = max(0, position - _BLOCK)
        data = os.pread(fd, position - start, start) + data
        position = start
    pieces = data.splitlines(keepends=True)
    return b"".join(pieces[-lines:]) if lines > 0 else b""
