"""Log lines of a running cluster or of the last run, and how they are printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TextIO

from epdctl.cli.console import is_fancy, plain, rank_prefix
from epdctl.cli.kept import newest_cluster
from epdctl.control.cluster import find_cluster, last_run_logs
from epdctl.control.logfiles import DAEMON, LogFile, tail
from epdctl.control.select import select_logs
from epdctl.errors import NotRunning
from epdctl.ids import RankName
from epdctl.wire.control import FollowLogs, LogLine

__all__ = ["LogPrinter", "kept_lines", "log_lines"]

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


def log_lines(cluster: str | None, wanted: FollowLogs) -> Iterator[LogLine]:
    """From the daemon; when none runs, from the files that the last run left.

    Raises SelectorError, and NotRunning when there is nothing to follow or nothing was kept.
    """
    try:
        daemon = find_cluster(cluster, os.environ).client
    except NotRunning:
        if wanted.follow:
            raise
        return kept_lines(last_run_logs(cluster or newest_cluster(os.environ), os.environ), wanted)
    return daemon.logs(wanted)


def kept_lines(files: list[LogFile], wanted: FollowLogs) -> Iterator[LogLine]:
    """The last lines of each wanted rank's last process, or of the one before it."""
    ranks = dict.fromkeys(RankName(file.rank) for file in files if file.rank != DAEMON)
    for rank in select_logs(wanted.ranks, list(ranks)):
        chosen = _incarnation(files, rank, previous=wanted.previous)
        if chosen is not None:
            for text in tail(chosen.path, wanted.tail if wanted.tail is not None else 1_000_000):
                yield LogLine(rank=rank, incarnation=chosen.incarnation, text=text)


def _incarnation(files: list[LogFile], rank: str, *, previous: bool) -> LogFile | None:
    own = [file for file in files if file.rank == rank]  # sorted by incarnation
    back = 2 if previous else 1
    return own[-back] if len(own) >= back else None
