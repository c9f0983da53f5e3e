"""What runs leave for reading, running ones included: which of them is meant, and its events. Asks no daemon."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from epdctl.control.cluster import ClusterRef, find_cluster, last_run
from epdctl.control.paths import RunState, all_runs
from epdctl.errors import NotRunning
from epdctl.wire.control import Event

__all__ = ["Kept", "events", "kept_events", "the_run"]


@dataclass(frozen=True, slots=True)
class Kept:
    """One run's files. ``running``: the cluster, while its daemon is alive."""

    state: RunState
    running: ClusterRef | None

    @property
    def epitaph(self) -> str | None:
        """Which run this was, for a person who may think that it runs."""
        if self.running is not None:
            return None
        ended = datetime.fromtimestamp(self.state.changed_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")
        return f"note: of the cluster {self.state.cluster}, run {self.state.run}, which is over since {ended}"


def the_run(cluster: str | None, environ: Mapping[str, str]) -> Kept:
    """Of the cluster that runs; else what ended last, of ``cluster`` where one is named.

    Raises SelectorError, and NotRunning when nothing was kept.
    """
    try:
        running = find_cluster(cluster, environ)
    except NotRunning:
        name = cluster or environ.get("EPDCTL_CLUSTER")
        return Kept(last_run(name, environ) if name else _newest(environ), None)
    return Kept(running.state, running)


def events(kept: Kept, *, follow: bool, tail: int | None) -> Iterator[Event]:
    """From the file that is written as they happen. Raises NotRunning when there is nothing to follow."""
    if not follow:
        return iter(deque(kept_events(kept.state.events), maxlen=tail))
    if kept.running is None:
        raise NotRunning(f"{kept.state.cluster} does not run, so there is nothing to follow")
    kept.running.client.status()  # one that hangs would be followed in silence
    return kept.running.client.events(follow=True, tail=tail)


def kept_events(path: Path) -> Iterator[Event]:
    """The events of a log and of the file before it; a last line that was cut short by a death is left out."""
    decoder = msgspec.json.Decoder(Event, dec_hook=lambda kind, value: kind(value))  # a RankName, from its text
    for file in (path.with_name(f"{path.name}.1"), path):
        try:
            lines = file.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        for line in lines[:-1]:  # what follows the last line end is not a whole line
            yield decoder.decode(b'{"t":"Event",' + line[1:])  # the file holds the struct without the wire's tag


def _newest(environ: Mapping[str, str]) -> RunState:
    found = all_runs(environ)
    if not found:
        raise NotRunning("no cluster is running, and none has left anything", hint="start one with: epdctl up FILE")
    return max(found, key=lambda run: run.changed_ns)
