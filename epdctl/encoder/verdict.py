"""Whether the encoder as a whole serves: by every rank of the plan, and not only by those that are there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epdctl.encoder.dispatch import RankKey
from epdctl.ids import RankName, Stage

__all__ = ["RankVerdict", "Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class RankVerdict:
    """``epdctl status`` has the reason why a rank does not serve: the daemon knows it, the router does not."""

    rank: RankName
    serves: bool
    incarnation: int | None
    pending: int

    def as_json(self) -> dict[str, object]:
        state = "ready" if self.serves else "not serving"
        return {"rank": str(self.rank), "state": state, "incarnation": self.incarnation, "pending": self.pending}


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


def judge(planned: int, ready: Sequence[tuple[RankKey, int]], *, strict: bool) -> Verdict:
    """``planned``: how many ranks there should be; ``ready``: those items may go to, with what each works on."""
    there: Mapping[RankName, tuple[RankKey, int]] = {key.rank: (key, pending) for key, pending in ready}
    names = sorted({RankName.of(Stage.ENCODER, number) for number in range(planned)} | set(there))
    ranks = [_verdict(name, there.get(name)) for name in names]
    serving = sum(rank.serves for rank in ranks)
    if not serving:
        return Verdict("unhealthy", 503, ranks)
    if serving < len(ranks):
        return Verdict("degraded", 503 if strict else 200, ranks)
    return Verdict("healthy", 200, ranks)


def _verdict(name: RankName, there: tuple[RankKey, int] | None) -> RankVerdict:
    if there is None:
        return RankVerdict(name, serves=False, incarnation=None, pending=0)
    return RankVerdict(name, serves=True, incarnation=there[0].incarnation, pending=there[1])
