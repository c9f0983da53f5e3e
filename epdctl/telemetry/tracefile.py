"""Chrome traces, event by event, read and written: such a file is hundreds of megabytes, and one JSON value.

Timestamps of torch's profiler are microseconds after ``baseTimeNanoseconds``, which is unix time; without that key they
are unix time themselves (kineto's ChromeTraceBaseTime).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec

from epdctl.errors import EpdError

__all__ = ["BrokenTrace", "Event", "TraceFile", "TraceWriter", "open_trace"]

CHUNK = 1 << 20  # characters read at once
LONGEST = 16 << 20  # of the head, and of one event
BATCH = 1 << 20  # bytes written at once

_EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
_GAP = re.compile(r"[\s,]*")

Event = dict[str, Any]


class BrokenTrace(EpdError):
    """The file is no trace, or ends before its end. What was read of it is fine."""


class TraceFile:
    """``base_ns``: unix time of timestamp 0. ``gpus``: how many the process saw."""

    def __init__(self, file: TextIO) -> None:
        """Reads the head. Raises BrokenTrace."""
        self._file = file
        self._decoder = json.JSONDecoder(strict=False)  # names of kernels may hold anything
        self._text = ""
        head = _parse(self._head())
        base, devices = head.get("baseTimeNanoseconds", 0), head.get("deviceProperties")
        if not isinstance(base, int):
            raise BrokenTrace(f"its baseTimeNanoseconds is {base!r}")
        self.base_ns = base
        self.gpus = len(devices) if isinstance(devices, list) else 0

    def events(self) -> Iterator[Event]:
        """Each of them once. Raises BrokenTrace, OSError."""
        position = 0
        while True:
            position = self._skip_gap(position)
            if self._text[position] == "]":
                return
            event, position = self._next(position)
            if isinstance(event, dict):
                yield event

    def _head(self) -> str:
        """What stands before the events, which it leaves as the text."""
        while (found := _EVENTS.search(self._text)) is None:
            self._grow(0, "holds no traceEvents")
        head, self._text = self._text[: found.start()], self._text[found.end() :]
        return head

    def _skip_gap(self, position: int) -> int:
        """The next place that holds something."""
        while True:
            gap = _GAP.match(self._text, position)
            position = position if gap is None else gap.end()
            if position < len(self._text):
                return position
            self._grow(position, "ends among its events")
            position = 0

    def _next(self, position: int) -> tuple[Any, int]:
        while True:
            try:
                return self._decoder.raw_decode(self._text, position)
            except json.JSONDecodeError:  # no whole event yet
                self._grow(position, "ends, or is broken, within an event")
                position = 0

    def _grow(self, position: int, otherwise: str) -> None:
        """Read on, and forget what is before ``position``."""
        more = self._file.read(CHUNK)
        rest = self._text[position:]
        if not more or len(rest) > LONGEST:
            raise BrokenTrace(f"it {otherwise}")
        self._text = rest + more


def _parse(head: str) -> Event:
    try:
        found = json.loads(head.rstrip().rstrip(",") + "}", strict=False)
    except json.JSONDecodeError as error:
        raise BrokenTrace(f"its head cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BrokenTrace("its head is no object")
    return found


def open_trace(path: Path) -> TextIO:
    """Raises OSError."""
    return path.open(encoding="utf-8", errors="replace")


class TraceWriter:
    """A trace in the making: ``add`` each event, then ``close``. Timestamp 0 is ``base_ns`` of unix time."""

    def __init__(self, file: gzip.GzipFile, base_ns: int) -> None:
        self._file = file
        self._encoder = msgspec.json.Encoder()
        self._waiting = bytearray(b'{"displayTimeUnit":"ms","baseTimeNanoseconds":%d,"traceEvents":[' % base_ns)
        self._gap = b"\n"

    def add(self, event: Event) -> None:
        self._waiting += self._gap
        self._waiting += self._encoder.encode(event)
        self._gap = b",\n"
        if len(self._waiting) > BATCH:
            self._flush()

    def close(self, other: dict[str, Any]) -> None:
        """``other``: what a reader may want to know of the whole."""
        self._waiting += b'],"otherData":' + self._encoder.encode(other) + b"}\n"
        self._flush()

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._waiting.clear()
