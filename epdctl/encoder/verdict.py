"""Whether the encoder as a whole serves: by every rank of the plan, and not only by those that are there. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from epdctl.encoder.dispatch import RankKey
from epdctl.ids import RankName, Stage
from epdctl.wire.lifecycle import Absent

__all__ = ["RankVerdict", "Roster", "Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Roster:
    """What the router knows of encoder ranks. ``there``: with what each works on; those ``resting`` finish it and get
    nothing new. ``absent``: planned, and not there."""

    there: Sequence[tuple[RankKey, int]] = ()
    resting: Collection[RankKey] = ()
    absent: Sequence[Absent] = ()


@dataclass(frozen=True, slots=True)
class RankVerdict:
    """``reason``: why it does not serve, where the supervisor has said it."""

    rank: RankName
    state: str  # ready | draining | unfit | not serving
    incarnation: int | None = None
    pending: int = 0
    reason: str | None = None

    @property
    def serves(self) -> bool:
        return self.state == "ready"

    def as_json(self) -> dict[str, object]:
        known: dict[str, object] = {"rank": str(self.rank), "state": self.state}
        known |= {"incarnation": self.incarnation, "pending": self.pending}
        return known if self.reason is None else {**known, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Verdict:
    word: str  # healthy | degraded | unhealthy
    status: int  # of HTTP
    ranks: Sequence[RankVerdict]

    def as_json(self) -> dict[str, object]:
        serving = sum(rank.serves for rank in self.ranks)
        return {
            "status": self.word,
            "serving": f"{serving} of {len(self.ranks)}",
            "ranks": [rank.as_json() for rank in self.ranks],
        }


def judge(planned: int, roster: Roster, *, strict: bool, faults: Mapping[RankName, str] | None = None) -> Verdict:
    """``planned``: how many ranks there should be; ``faults``: of those that were proved unfit just now."""
    ranks = _verdicts(planned, roster, faults or {})
    serving = sum(rank.serves for rank in ranks)
    if not serving:
        return Verdict("unhealthy", 503, ranks)
    if serving < len(ranks):
        return Verdict("degraded", 503 if strict else 200, ranks)
    return Verdict("healthy", 200, ranks)


def _verdicts(planned: int, roster: Roster, faults: Mapping[RankName, str]) -> list[RankVerdict]:
    found = {RankName.of(Stage.ENCODER, number): _unknown(number) for number in range(planned)}
    found |= {each.rank: _missing(each) for each in roster.absent if each.stage is Stage.ENCODER}
    for key, pending in roster.there:
        state, reason = "ready", faults.get(key.rank)
        if key in roster.resting:
            state, reason = "draining", "it finishes what it has"
        elif reason is not None:
            state = "unfit"
        found[key.rank] = RankVerdict(key.rank, state, key.incarnation, pending, reason)
    return [found[rank] for rank in sorted(found)]


def _unknown(number: int) -> RankVerdict:
    return RankVerdict(RankName.of(Stage.ENCODER, number), "not serving")


def _missing(absent: Absent) -> RankVerdict:
    return RankVerdict(absent.rank, "not serving", reason=absent.reason or None)
