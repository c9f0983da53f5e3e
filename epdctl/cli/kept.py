"""What the last run left for reading: which cluster it was, and its event log."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from epdctl.control.cluster import find_cluster, last_run
from epdctl.control.paths import state_base
from epdctl.errors import NotRunning
from epdctl.wire.control import Event

__all__ = ["events", "kept_events", "newest_cluster"]


def events(cluster: str | None, *, follow: bool, tail: int | None) -> Iterator[Event]:
    """From the daemon; when none runs, from the file that the last run left.

    Raises SelectorError, and NotRunning when there is nothing to follow or nothing was kept.
    """
    try:
        daemon = find_cluster(cluster, os.environ).client
    except NotRunning:
        if follow:
            raise
        state = last_run(cluster or newest_cluster(os.environ), os.environ)
        return iter(deque(kept_events(state.events), maxlen=tail))
    return daemon.events(follow=follow, tail=tail)


def kept_events(path: Path) -> Iterator[Event]:
    """The events of a log file; a last line that was cut short by a death is left out."""
    decoder = msgspec.json.Decoder(Event, dec_hook=lambda kind, value: kind(value))  # a RankName, from its text
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines[:-1]:  # what follows the last line end is not a whole line
        yield decoder.decode(b'{"t":"Event",' + line[1:])  # the file holds the struct without the wire's tag


def newest_cluster(environ: Mapping[str, str]) -> str:
    """The cluster that ran last. Raises NotRunning when none ever did."""
    try:
        found = [entry for entry in os.scandir(state_base(environ)) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        found = []
    if not found:
        raise NotRunning("no cluster is running, and none has left anything", hint="start one with: epdctl up FILE")
    return max(found, key=lambda entry: entry.stat().st_mtime_ns).name
