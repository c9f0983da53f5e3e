"""Reading log files while they grow, several merged into one stream of lines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path

from epdctl.control.logfiles import LogFile, last_bytes, log_files
from epdctl.errors import SelectorError
from epdctl.ids import RankName
from epdctl.wire.control import FollowLogs, LogLine

__all__ = ["LogReader", "bound", "drop_old", "read_logs"]

POLL_SECONDS = 0.2  # only while somebody follows
KEPT_INCARNATIONS = 10  # of each rank
_BLOCK = 256 << 10  # read in one go, so that one busy rank does not starve the others
LONGEST_LOG = 64 << 20  # bytes of one incarnation
LONGEST_LINE = 64 << 10  # bytes; a longer one is cut into several


class LogReader:
    """One incarnation's log, read as it grows."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._offset = 0
        self._rest = b""  # of a line that is not complete yet

    def skip_to_tail(self, lines: int) -> None:
        data, end = last_bytes(self.file.path, lines)
        self._offset = end - len(data)

    def more(self) -> list[LogLine]:
        """The lines completed since the last call, of one block at most."""
        data = self._rest + self._read()
        complete, newline, self._rest = data.rpartition(b"\n")
        lines = complete.split(b"\n") if newline else []
        if len(self._rest) > LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        return [self._line(line) for line in lines]

    def everything(self) -> Iterator[LogLine]:
        """All lines up to the present end, the last one too where its newline is missing."""
        while lines := self.more():
            yield from lines
        if self._rest:
            yield self._line(self._rest)

    def _read(self) -> bytes:
        try:
            with self.file.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # it was cut since
                    self._offset = 0
                file.seek(self._offset)
                data = file.read(_BLOCK)
        except FileNotFoundError:  # the rank has not been started yet, or the log was dropped as old
            return b""
        self._offset += len(data)
        return data

    def _line(self, line: bytes) -> LogLine:
        text = line.decode(errors="replace").rstrip("\r")
        return LogLine(rank=self.file.rank, incarnation=self.file.incarnation, text=text)


async def read_logs(
    directory: Path, ranks: Sequence[str], command: FollowLogs, ended: Callable[[], bool]
) -> AsyncGenerator[LogLine, None]:
    """The lines that ``command`` asks for, rank by rank; then, following, new ones as they come until ``ended()``.

    Following picks up new incarnations; the previous incarnation does not grow, so there it makes no difference.
    Raises SelectorError when the previous incarnation is wanted and there is none.
    """
    readers = {file.path: LogReader(file) for file in _chosen(directory, ranks, command.previous)}
    for reader in readers.values():
        if command.tail is not None:
            reader.skip_to_tail(command.tail)
    following = command.follow and not command.previous
    for reader in readers.values():
        while lines := reader.more() if following else list(reader.everything()):
            for line in lines:
                yield line
    while following:
        last = ended()  # asked before reading: what was written until then is read
        for line in _news(directory, ranks, readers):
            yield line
        if last:
            return
        await asyncio.sleep(POLL_SECONDS)


def drop_old(directory: Path, rank: RankName) -> None:
    """Delete the logs of a rank's oldest incarnations: a rank that restarts for weeks must not fill the disk."""
    for file in _of(directory, rank)[:-KEPT_INCARNATIONS]:
        file.path.unlink(missing_ok=True)


def bound(directory: Path, limit: int = LONGEST_LOG) -> None:
    """Cut logs that have grown beyond ``limit`` bytes: the newest half moves to ``<name>.1``, and the file begins anew.

    The rank goes on writing to the same open file, always at its end; a line in the making may be lost.
    """
    for file in log_files(directory):
        if file.path.stat().st_size > limit:
            file.path.with_name(file.path.name + ".1").write_bytes(_last(file.path, limit // 2))
            os.truncate(file.path, 0)


def _last(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(-size, os.SEEK_END)
        return file.read(size)


def _of(directory: Path, rank: str) -> list[LogFile]:
    return [file for file in log_files(directory) if file.rank == rank]


def _chosen(directory: Path, ranks: Sequence[str], previous: bool) -> list[LogFile]:
    back = 2 if previous else 1
    histories = [_of(directory, rank) for rank in ranks]
    chosen = [history[-back] for history in histories if len(history) >= back]
    if previous and not chosen:
        raise SelectorError("no rank here has a previous incarnation: each has started only once")
    return chosen


def _news(directory: Path, ranks: Sequence[str], readers: dict[Path, LogReader]) -> Iterator[LogLine]:
    newest = {
        rank: max((r.file.incarnation for r in readers.values() if r.file.rank == rank), default=0) for rank in ranks
    }
    for file in log_files(directory):
        if file.rank in newest and file.incarnation > newest[file.rank]:
            readers[file.path] = LogReader(file)
    for reader in readers.values():
        yield from reader.more()
