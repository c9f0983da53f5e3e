"""How a process ended, in words."""

from __future__ import annotations

import signal

from epdctl.supervisor.states.events import Exited
from epdctl.supervisor.states.rank import Rank

__all__ = ["MEANINGS", "ending", "how_it_went"]

MEANINGS = {  # of the exit statuses that a rank of ours leaves with
    80: "it lost its supervisor",
    81: "its checkpoint cannot be loaded",
    82: "its settings cannot be served",
    83: "its port is taken",
    84: "out of memory",
    85: "it does not fit the ranks that serve",
    86: "an error of its own",
    127: "it could not be started",
}


def ending(rank: Rank, event: Exited) -> str:
    """Why the process ended, for a person: how it went, then its last words."""
    needed = " while it was needed" if event.code == 0 and event.by == "rank" else ""
    how = event.reason_text or how_it_went(event.code, event.by) + needed
    return f"{how}: {rank.fatal.text}" if rank.fatal else how


def how_it_went(code: int, by: str) -> str:
    """``code``: exit status, or minus the signal's number. ``by``: whose end it was, the rank's or its guard's."""
    if by == "guard":
        return f"its guard was killed by {_name(-code)}" if code < 0 else f"its guard exited with status {code}"
    if code < 0:
        return f"killed by {_name(-code)}"
    return f"exited with status {code} ({MEANINGS[code]})" if code in MEANINGS else f"exited with status {code}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
