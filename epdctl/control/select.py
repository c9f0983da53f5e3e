"""Which ranks a person means: a rank's name, a stage, or "all". Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from epdctl.control.logfiles import DAEMON
from epdctl.errors import SelectorError
from epdctl.ids import RankName

__all__ = ["did_you_mean", "select", "select_logs"]


def select(selectors: Sequence[str], ranks: Sequence[RankName]) -> list[RankName]:
    """The ranks meant, each once, in the order of ``ranks``; no selector means all of them.

    Raises SelectorError for the first selector that matches nothing.
    """
    if not selectors:
        return list(ranks)
    wanted = {rank for selector in selectors for rank in _matches(selector, ranks)}
    return [rank for rank in ranks if rank in wanted]


def select_logs(selectors: Sequence[str], ranks: Sequence[RankName]) -> list[str]:
    """As ``select``; besides, "daemon" means the daemon's own log, which nothing else does."""
    named = [selector for selector in selectors if selector != DAEMON]
    chosen = select(named, ranks) if named or not selectors else []
    return [DAEMON, *chosen] if DAEMON in selectors else [*chosen]


def _matches(selector: str, ranks: Sequence[RankName]) -> list[RankName]:
    found = [rank for rank in ranks if selector in ("all", rank, str(rank.stage), rank.partition(".")[0])]
    if not found:
        names = [*dict.fromkeys(str(rank.stage) for rank in ranks), *map(str, ranks)]
        raise SelectorError(f"no rank or stage is called {selector!r}", hint=did_you_mean(selector, names))
    return found


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
