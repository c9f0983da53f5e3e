"""One rank's share of a merged trace: its process there, its clock, and its events under numbers that are its own.

Two hosts may give the same pid, and a profiler counts threads of CPU and GPU under several pids: here a rank is one
process, and its threads and the ids of its arrows are numbered over the whole trace.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from epdctl.errors import BadMessage
from epdctl.telemetry.tracefile import BrokenTrace, Event, TraceFile, open_trace
from epdctl.telemetry.tracks import Placed, lanes
from epdctl.wire.trace import HOP_LIST, HopList, MergedSource, TraceSource

__all__ = ["Share"]

LONGEST_HOPS = 256 << 20  # bytes of one rank's file
FLOWS = 1 << 40  # ids of arrows: those between ranks lie below it, then come as many for each rank
TEXT = 200  # characters of a name
NO_KERNELS = "its trace holds no GPU kernel: torch's profiler may not read the GPU's activity (CUPTI)"


class Share:
    """``place``: of the rank among all. ``tid`` draws the number of one more thread."""

    def __init__(self, place: int, source: TraceSource, tid: Callable[[], int]) -> None:
        self.place = place
        self.source = source
        self.hops = HopList(until=0, hops=[])
        self.error: str | None = None
        self._events = 0
        self._notes: list[str] = []
        self._new_tid = tid
        self._threads: dict[tuple[str, str], int] = {}  # pid and tid as they were → tid
        self._names: dict[tuple[str, str], str] = {}
        self._labels: dict[str, str] = {}  # of a pid: "GPU 0"
        if source.hops is not None:
            self._read_hops(Path(source.hops))

    @property
    def pid(self) -> int:
        return self.place + 1

    @property
    def offset_ns(self) -> int:
        return round(self.source.offset_us * 1000)

    @property
    def uncertainty_ns(self) -> float:
        return 1000.0 * (self.source.uncertainty_us or 0.0)

    @property
    def report(self) -> MergedSource:
        return MergedSource(
            rank=self.source.rank,
            events=self._events,
            hops=len(self.hops.hops),
            left_out=self.hops.left_out,
            error=self.error,
            note="; ".join(self._notes) or None,
        )

    def placed(self) -> list[Placed]:
        """Its hops on the common clock, each on its lane."""
        until = self.hops.until
        lane = lanes(self.hops.hops, until)
        placed = []
        for hop in self.hops.hops:
            began = hop.began - self.offset_ns
            ended = max(began, (until if hop.ended is None else hop.ended) - self.offset_ns)
            placed.append(Placed(self.place, lane[hop.way], hop, began, ended, self.uncertainty_ns))
        return placed

    def profile(self, origin_ns: int) -> Iterator[Event]:
        """What its profiler wrote, as far as it can be read, in microseconds after ``origin_ns``."""
        if self.source.trace is None:
            return
        try:
            with open_trace(Path(self.source.trace)) as file:
                trace = TraceFile(file)
                shift = (trace.base_ns - self.offset_ns - origin_ns) / 1000
                kernels = 0
                for event in trace.events():
                    kernels += event.get("cat") == "kernel"
                    if event.get("ph") == "M":
                        self._learn(event)
                    elif self._move(event, shift):
                        yield event
                if trace.gpus and not kernels:
                    self._notes.append(NO_KERNELS)
        except (OSError, BrokenTrace) as error:
            self._fail(f"its trace cannot be read to the end: {error}")

    def thread_names(self) -> Iterator[tuple[int, str]]:
        """Of the threads that ``profile`` has met: CPU threads by their own names, a GPU's streams with its label."""
        for (pid, tid), ours in self._threads.items():
            label = self._labels.get(pid, "")
            name = self._names.get((pid, tid)) or tid or pid or "profiler"
            yield ours, (name if label in ("", "CPU") else f"{label} {name}")[:TEXT]

    def _fail(self, error: str) -> None:
        self.error = f"{self.error}; {error}" if self.error else error

    def _read_hops(self, path: Path) -> None:
        try:
            if path.stat().st_size > LONGEST_HOPS:
                raise BadMessage(f"{path} is longer than {LONGEST_HOPS} bytes")
            self.hops = HOP_LIST.decode(path.read_bytes())
            if self.hops.left_out:
                self._notes.append(f"{self.hops.left_out} hops beyond what a rank keeps are left out")
        except (OSError, msgspec.DecodeError, BadMessage) as error:
            self._fail(f"its hops cannot be read: {error}")

    def _move(self, event: Event, shift: float) -> bool:
        """Onto the common clock and under our numbers; False for one that has no place in a trace of many."""
        timestamp = event.get("ts")
        if not isinstance(timestamp, int | float) or event.get("s") == "g":  # a mark over all ranks would be of one
            return False
        event["ts"] = timestamp + shift
        event["tid"] = self._tid(_text(event, "pid"), _text(event, "tid"))
        event["pid"] = self.pid
        for name in ("id", "bind_id"):
            if name in event:
                event[name] = self._flow_id(event[name])
        self._events += 1
        return True

    def _learn(self, event: Event) -> None:
        """Names come as events; of several processes one is left, so that all of them go to threads."""
        args: Any = event.get("args")
        if not isinstance(args, dict):
            return
        pid = _text(event, "pid")
        if event.get("name") == "thread_name":
            self._names[pid, _text(event, "tid")] = str(args.get("name", ""))
        elif event.get("name") == "process_labels":
            self._labels[pid] = str(args.get("labels", ""))

    def _tid(self, pid: str, tid: str) -> int:
        found = self._threads.get((pid, tid))
        if found is None:
            found = self._threads[pid, tid] = self._new_tid()
        return found

    def _flow_id(self, value: object) -> int:
        number = value if isinstance(value, int) else zlib.crc32(str(value).encode())
        return (self.place + 1) * FLOWS + number % FLOWS


def _text(event: Event, name: str) -> str:
    """A pid or tid: kineto writes numbers, and words for what is no process."""
    return str(event.get(name, ""))
