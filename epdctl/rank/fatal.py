"""Which error ends a rank how: one table. Knows torch's errors without importing torch."""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from dataclasses import dataclass

from epdctl.errors import EpdError, IncompatiblePeer, LoadError, UserError
from epdctl.wire.lifecycle import Fatal, FatalKind

__all__ = ["RULES", "Departure", "Rule", "fatal", "status_of"]


class Departure(enum.IntEnum):
    """Exit statuses of a rank's process."""

    ASKED = 0  # told to leave, by SIGTERM
    ORPHANED = 80  # the supervisor's stream ended
    CHECKPOINT = 81
    CONFIG = 82
    PORT = 83
    MEMORY = 84
    INCOMPATIBLE = 85
    CRASH = 86


STATUS = {
    FatalKind.CHECKPOINT: Departure.CHECKPOINT,
    FatalKind.CONFIG: Departure.CONFIG,
    FatalKind.PORT: Departure.PORT,
    FatalKind.MEMORY: Departure.MEMORY,
    FatalKind.INCOMPATIBLE: Departure.INCOMPATIBLE,
    FatalKind.CRASH: Departure.CRASH,
}


def _out_of_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or "DefaultCPUAllocator" in str(error)


def _port_in_use(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


@dataclass(frozen=True, slots=True)
class Rule:
    """``at_load``, ``serving``: whether a restart may help, by when it happened."""

    matches: Callable[[BaseException], bool]
    kind: FatalKind
    at_load: bool
    serving: bool


RULES = (  # the first that matches
    Rule(_is(LoadError), FatalKind.CHECKPOINT, at_load=False, serving=False),
    Rule(_is(IncompatiblePeer), FatalKind.INCOMPATIBLE, at_load=False, serving=False),
    Rule(_is(UserError), FatalKind.CONFIG, at_load=False, serving=False),
    Rule(_out_of_memory, FatalKind.MEMORY, at_load=False, serving=True),  # what never fitted will not fit next time
    Rule(_port_in_use, FatalKind.PORT, at_load=True, serving=True),
    Rule(_is(BaseException), FatalKind.CRASH, at_load=True, serving=True),
)


def fatal(error: BaseException, *, serving: bool) -> Fatal:
    """The last words of a rank that ``error`` ends."""
    rule = next(rule for rule in RULES if rule.matches(error))
    return Fatal(kind=rule.kind, text=_text(error), restartable=rule.serving if serving else rule.at_load)


def _text(error: BaseException) -> str:
    if isinstance(error, EpdError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def status_of(last: Fatal) -> Departure:
    return STATUS[last.kind]
