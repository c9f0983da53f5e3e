"""What a person sees while a cluster comes up or goes down: a table that stays in place, or a line per change."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from epdctl.cli import console, tables

if TYPE_CHECKING:
    from epdctl.wire.control import StatusReply

__all__ = ["LineScreen", "LiveScreen", "Screen", "screen"]


class Screen(Protocol):
    def show(self, reply: StatusReply) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LineScreen:
    """For a pipe, a file or a dumb terminal: each change once."""

    def __init__(self) -> None:
        self._last: StatusReply | None = None

    def show(self, reply: StatusReply) -> None:
        for line in tables.changes(self._last, reply):
            console.say(line)
        self._last = reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class LiveScreen:
    """For a terminal: the table of ``status``, redrawn in its place on stderr."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(console=console.console(sys.stderr), auto_refresh=False)

    def show(self, reply: StatusReply) -> None:
        try:
            self._live.update(tables.status_view(reply), refresh=True)
        except OSError:  # the terminal is gone; its SIGHUP says what follows
            console.hush(sys.stderr)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._live.stop()
        except OSError:  # the terminal is gone
            console.hush(sys.stderr)


def screen() -> Screen:
    return LiveScreen() if console.is_fancy(sys.stderr) else LineScreen()
