"""The steps from which every handler of the rank machine is made: one state to the next, and what that needs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from epdctl.supervisor.states.actions import Action, Arm, SendDrain, Signal
from epdctl.supervisor.states.events import Timer
from epdctl.supervisor.states.rank import Rank, Rules, recalling
from epdctl.wire.control import RankState

__all__ = ["Handler", "Outcome", "drain", "end", "move", "wait"]

HISTORY = 16

Outcome = tuple[Rank, list[Action]]
Handler = Callable[[Rank, Any, float, Rules], Outcome]


def move(rank: Rank, to: RankState, reason: str, *actions: Action) -> Outcome:
    return replace(rank, state=to, reason=reason, history=(*rank.history, (to, reason))[-HISTORY:]), list(actions)


def wait(rank: Rank, rules: Rules) -> Outcome:
    goal = "its gang" if rules.gang else "its turn to start"
    return move(replace(rank, wanted=True), RankState.WAITING, recalling(rank, f"waiting for {goal}"))


def drain(rank: Rank, reason: str, rules: Rules) -> Outcome:
    seconds = rules.deadlines.drain
    return move(rank, RankState.DRAINING, reason, SendDrain(seconds), Arm(Timer.DRAIN, seconds))


def end(rank: Rank, reason: str, number: signal.Signals, rules: Rules) -> Outcome:
    rank = replace(rank, killed=number is signal.SIGKILL)
    return move(rank, RankState.STOPPING, reason, Signal(number), Arm(Timer.KILL, rules.deadlines.kill))
