"""One trace of a whole capture: what every rank's profiler wrote and the hops it noted, on the supervisor's clock.

A program of its own (``python -m epdctl.telemetry.merge``), so that the daemon goes on meanwhile: one MergeOrder on
standard input, one MergeReport on standard output; it ends when standard input does. Holds one event at a time, and all
hops. The format is Chrome's trace events, gzipped, which Perfetto reads.
"""

from __future__ import annotations

import gzip
import itertools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epdctl.telemetry.share import Share
from epdctl.telemetry.tracefile import TraceWriter
from epdctl.telemetry.tracks import Arrow, Placed, arrows
from epdctl.wire.message import MAX_MESSAGE_BYTES
from epdctl.wire.trace import MERGE_ORDER, MERGE_REPORT, MergeOrder, MergeReport

__all__ = ["main", "merge"]

POLITE = 10
LENGTH = 4  # bytes before the order, big-endian
COMPRESSION = 3  # of gzip: a fifth of the size, and half the time of the default's
MARGIN_NS = 10_000_000  # before the first moment: nothing may stand before 0
INSIDE_NS = 500  # before a slice's end its arrow leaves it: at the very end the next one has begun


def merge(order: MergeOrder) -> MergeReport:
    """Write ``order.path``, whole or not at all. A rank whose file cannot be read is reported, and left where it broke.

    Raises OSError when the merged file cannot be written.
    """
    target = Path(order.path)
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with gzip.open(partial, "wb", compresslevel=COMPRESSION) as file:
            assert isinstance(file, gzip.GzipFile)
            report = _Merge(order, file).write()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return report


class _Merge:
    def __init__(self, order: MergeOrder, file: gzip.GzipFile) -> None:
        numbers = itertools.count(1)
        self._order = order
        self._tids = numbers
        self._shares = [Share(place, source, numbers.__next__) for place, source in enumerate(order.sources)]
        self._lanes: dict[tuple[int, int], int] = {}  # rank and lane → tid
        self._origin = _origin(order, self._shares)
        self._writer = TraceWriter(file, self._origin)

    def write(self) -> MergeReport:
        placed: list[Placed] = []
        for share in self._shares:
            self._name("process_name", share.pid, 0, {"name": str(share.source.rank)})
            self._name("process_sort_index", share.pid, 0, {"sort_index": share.place})
            placed += self._ways(share)
        drawn = list(arrows(placed))
        self._arrows(drawn)
        for share in self._shares:
            for event in share.profile(self._origin):
                self._writer.add(event)
            for tid, name in share.thread_names():
                self._name("thread_name", share.pid, tid, {"name": name})
        report = MergeReport(
            sources=[share.report for share in self._shares],
            arrows=len(drawn),
            backwards=sum(arrow.backwards for arrow in drawn),
        )
        self._writer.close(self._other(report))
        return report

    def _us(self, ns: int) -> float:
        return (ns - self._origin) / 1000

    def _ways(self, share: Share) -> list[Placed]:
        placed = share.placed()
        ways: dict[int, list[Placed]] = {}
        for each in placed:
            ways.setdefault(each.hop.way, []).append(each)
        for lane in sorted({each.lane for each in placed}):
            tid = self._lanes[share.place, lane] = next(self._tids)
            self._name("thread_name", share.pid, tid, {"name": f"requests {lane + 1}"})
            self._name("thread_sort_index", share.pid, tid, {"sort_index": lane - len(ways)})  # above the profiler's
        for way in ways.values():
            self._way(way)
        return placed

    def _way(self, way: Sequence[Placed]) -> None:
        """A slice around all of its hops, then each of them: whoever contains others comes first."""
        hop = way[0].hop
        item = "" if hop.item is None else f" item {hop.item}"
        span = min(each.began for each in way), max(each.ended for each in way)
        self._slice(way[0], f"{hop.kind.value} {hop.request}{item}", span, {})
        for each in sorted(way, key=lambda one: (one.began, one.hop.inner, -one.ended)):
            args = {"attempt": each.hop.attempt, "note": each.hop.text or None}
            if each.hop.ended is None:
                args["open"] = "it had not ended when the recording did"
            self._slice(each, each.hop.name, (each.began, each.ended), args)

    def _slice(self, placed: Placed, name: str, span: tuple[int, int], args: dict[str, Any]) -> None:
        args = {"request": placed.hop.request, "item": placed.hop.item, **args}
        event = {
            "ph": "X",
            "cat": "hop",
            "name": name,
            **self._thread(placed),
            "ts": self._us(span[0]),
            "dur": (span[1] - span[0]) / 1000,
            "args": {key: value for key, value in args.items() if value is not None},
        }
        self._writer.add(event)

    def _arrows(self, drawn: Sequence[Arrow]) -> None:
        for number, arrow in enumerate(drawn):
            source, target = arrow.source, arrow.target
            inside = source.ended - min(INSIDE_NS, (source.ended - source.began) // 2)
            leaves = max(source.began, min(target.began, inside))
            common = {"cat": "hop", "name": "then", "id": number}
            self._writer.add({**common, "ph": "s", **self._thread(source), "ts": self._us(leaves)})
            self._writer.add({**common, "ph": "f", "bp": "e", **self._thread(target), "ts": self._us(target.began)})

    def _thread(self, placed: Placed) -> dict[str, int]:
        return {"pid": self._shares[placed.rank].pid, "tid": self._lanes[placed.rank, placed.lane]}

    def _name(self, kind: str, pid: int, tid: int, args: dict[str, Any]) -> None:
        self._writer.add({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args})

    def _other(self, report: MergeReport) -> dict[str, Any]:
        ranks = {
            str(share.source.rank): {
                "pid": share.pid,
                "clock_offset_us": share.source.offset_us,
                "clock_uncertainty_us": share.source.uncertainty_us,
                "note": merged.note or share.source.note,
                "events": merged.events,
                "hops": merged.hops,
                "hops_left_out": merged.left_out,
                "error": merged.error,
            }
            for share, merged in zip(self._shares, report.sources, strict=True)
        }
        return {
            "capture": self._order.capture,
            "cluster": self._order.cluster,
            "clock": "the supervisor's; microseconds after baseTimeNanoseconds, which is unix time",
            "ranks": ranks,
            "arrows": report.arrows,
            "arrows_backwards": report.backwards,
        }


def _origin(order: MergeOrder, shares: Sequence[Share]) -> int:
    """Unix time of timestamp 0: before everything, as far as clocks can be trusted."""
    moments = [hop.began - share.offset_ns for share in shares for hop in share.hops.hops]
    doubt = max((share.uncertainty_ns for share in shares), default=0.0)
    return min([order.began, *moments]) - MARGIN_NS - round(doubt)


def main() -> int:
    """Exit 0 when a report was given, whatever it says."""
    os.nice(POLITE)  # requests go first
    size = int.from_bytes(_exactly(LENGTH), "big")
    if not 0 < size <= MAX_MESSAGE_BYTES:
        return 2
    order = MERGE_ORDER.decode(_exactly(size))
    threading.Thread(target=_end_with_the_owner, name="owner", daemon=True).start()
    try:
        report = merge(order)
    except OSError as error:
        report = MergeReport(sources=[], error=f"{order.path} cannot be written: {error}")
    os.write(1, MERGE_REPORT.encode(report))
    return 0


def _exactly(size: int) -> bytes:
    """Unbuffered: a thread that is in a buffered read when the interpreter ends makes it abort."""
    read = b""
    while len(read) < size and (more := os.read(0, size - len(read))):
        read += more
    return read


def _end_with_the_owner() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
