"""Log lines of a running cluster or of the last run, from its files, and how they are printed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import TextIO

from epdctl.cli.console import is_fancy, plain, rank_prefix
from epdctl.cli.kept import Kept
from epdctl.control.cluster import ClusterRef
from epdctl.control.logfiles import DAEMON, log_files
from epdctl.control.paths import RunState
from epdctl.control.select import select_logs
from epdctl.errors import NotRunning
from epdctl.ids import RankName
from epdctl.supervisor.logs import read_logs
from epdctl.wire.control import FollowLogs, LogLine

__all__ = ["LogPrinter", "log_lines"]

_WIDTH = len("encoder-router/0")


class LogPrinter:
    """Prints ``encoder/0        | text``; off a terminal without any control code, the rank's own included."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colours = is_fancy(stream)

    def print(self, line: LogLine) -> None:
        text = line.text if self._colours else plain(line.text)
        prefix = rank_prefix(line.rank, _WIDTH, colours=self._colours)
        self._stream.write(f"{prefix}{text.rstrip()}\n")
        self._stream.flush()


def log_lines(kept: Kept, wanted: FollowLogs) -> Generator[LogLine, None, None]:
    """Read where the ranks write: a daemon that hangs or has died is not missed.

    Raises SelectorError, and NotRunning when there is nothing to follow.
    """
    running = kept.running
    if wanted.follow and running is None:
        raise NotRunning(f"{kept.state.cluster} does not run, so there is nothing to follow")
    chosen = select_logs(wanted.ranks, _ranks(kept.state, running))
    lines = read_logs(kept.state.logs, chosen, wanted, lambda: running is None or not running.directory.running)
    return _each(lines)


def _ranks(state: RunState, running: ClusterRef | None) -> list[RankName]:
    """In the order of the plan, as far as it is known."""
    planned = map(RankName, running.record.ranks if running is not None else [])
    written = (RankName(file.rank) for file in log_files(state.logs) if file.rank != DAEMON)
    return list(dict.fromkeys([*planned, *written]))


def _each(lines: AsyncGenerator[LogLine, None]) -> Generator[LogLine, None, None]:
    async def following() -> LogLine | None:
        return await anext(lines, None)

    with asyncio.Runner() as runner:
        while (line := runner.run(following())) is not None:
            yield line
