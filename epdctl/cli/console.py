"""Where output goes: stdout is data, stderr is for people, and neither carries a control code off a terminal."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from epdctl.errors import EpdError

__all__ = ["console", "data", "hush", "is_fancy", "plain", "rank_prefix", "say", "show", "show_error", "show_json"]

_CONTROL = re.compile(  # of one byte, C1's, too: some terminals obey them
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_PIPE_COLUMNS = 10_000  # a pipe has no edge: nothing is cut for want of columns
_PREFIX_COLOURS = (36, 35, 34, 33, 32, 96, 95, 94, 93, 92)


def is_fancy(stream: TextIO) -> bool:
    """Whether colours and cursor movement are welcome there."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def console(stream: TextIO) -> Console:
    from rich.console import Console

    fancy = is_fancy(stream)
    return Console(
        file=stream,
        force_terminal=fancy,
        force_interactive=fancy,
        color_system="auto" if fancy else None,
        width=None if stream.isatty() else _PIPE_COLUMNS,
        highlight=False,
        markup=False,
        emoji=False,
    )


def plain(text: str) -> str:
    """``text`` without control codes; tabs and line ends stay."""
    return _CONTROL.sub("", text)


def show(renderable: RenderableType, stream: TextIO | None = None) -> None:
    """One table on stdout (or ``stream``), without the blanks that pad its last column."""
    out = stream or sys.stdout
    if is_fancy(out):
        console(out).print(renderable)
        return
    target = console(out)
    with target.capture() as captured:
        target.print(renderable)
    out.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def data(text: str) -> None:
    """One line of data."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_json(value: object) -> None:
    """The reply struct, field for field, on one line."""
    from epdctl.wire.message import to_json

    data(to_json(value).decode())


def say(text: str) -> None:
    """One line for people. Whoever closed the terminal reads it no more, and that is no reason to fail."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        hush(sys.stderr)


def hush(stream: TextIO) -> None:
    """Send the rest of ``stream`` nowhere: its reader is gone, and the interpreter still flushes it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def show_error(error: EpdError) -> None:
    for line in error.message.splitlines() or [type(error).__name__]:
        say(f"error: {plain(line)}")
    for line in getattr(error, "log_tail", ()):
        say(f"  | {plain(line)}")
    if error.hint:
        say(f"hint: {error.hint}")


def rank_prefix(rank: str, width: int, *, colours: bool) -> str:
    """``encoder/0  | ``: the same colour for the same rank in every run."""
    label = f"{rank:<{width}} | "
    if not colours:
        return label
    colour = _PREFIX_COLOURS[sum(rank.encode()) % len(_PREFIX_COLOURS)]
    return f"\x1b[{colour}m{label}\x1b[0m"
