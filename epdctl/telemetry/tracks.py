"""Where hops stand in a merged trace, and which arrows join them. Pure.

Slices of one thread must nest, and requests overlap: so every way gets a lane that is its own for as long as it lasts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from epdctl.wire.trace import Hop, Kind

__all__ = ["ARROWS", "Arrow", "Placed", "Rule", "arrows", "lanes"]


@dataclass(frozen=True, slots=True)
class Placed:
    """One hop on the common clock (nanoseconds), with the rank's place among the tracks and its lane there."""

    rank: int
    lane: int
    hop: Hop
    began: int
    ended: int
    uncertainty: float  # of its rank's clock, nanoseconds


@dataclass(frozen=True, slots=True)
class Rule:
    """The hop that one leads to: on another rank, or in a mono rank's other half."""

    source: tuple[Kind, str]
    target: tuple[Kind, str]
    same_item: bool = False


# A hop's end is what lets the next one go on.
ARROWS: Sequence[Rule] = (
    Rule((Kind.REQUEST, "received"), (Kind.PREFILL, "waiting")),
    Rule((Kind.REQUEST, "received"), (Kind.DECODE, "waiting")),
    Rule((Kind.REQUEST, "received"), (Kind.GENERATE, "waiting")),
    Rule((Kind.DECODE, "waiting"), (Kind.PREFILL, "landing")),  # decode's lease
    Rule((Kind.PREFILL, "waiting"), (Kind.ITEM, "queued")),  # slots for the embeddings, by way of the gateway
    Rule((Kind.GENERATE, "waiting"), (Kind.ITEM, "queued")),
    Rule((Kind.ITEM, "queued"), (Kind.ENCODE, "preparing"), same_item=True),
    Rule((Kind.ENCODE, "writing"), (Kind.PREFILL, "running")),
    Rule((Kind.ENCODE, "writing"), (Kind.GENERATE, "running")),
    Rule((Kind.PREFILL, "running"), (Kind.DECODE, "running")),
    Rule((Kind.DECODE, "landing"), (Kind.REQUEST, "handoff")),  # the first token, which came with the KV
    Rule((Kind.GENERATE, "chunk"), (Kind.REQUEST, "decoding")),
)


@dataclass(frozen=True, slots=True)
class Arrow:
    source: Placed
    target: Placed

    @property
    def backwards(self) -> bool:
        """It ends before its source began, by more than the two clocks can be off."""
        slack = self.source.uncertainty + self.target.uncertainty
        return self.target.began + slack < self.source.began


def lanes(hops: Sequence[Hop], until: int) -> dict[int, int]:
    """The lane of each way, from 0: the first that is free from its first hop to its last.

    ``until``: the end of the recording, and so of what had not ended.
    """
    spans: dict[int, tuple[int, int]] = {}
    for hop in hops:
        ended = until if hop.ended is None else hop.ended
        first, last = spans.get(hop.way, (hop.began, ended))
        spans[hop.way] = min(first, hop.began), max(last, ended)
    chosen: dict[int, int] = {}
    busy_until: list[int] = []
    for way, (first, last) in sorted(spans.items(), key=lambda entry: entry[1]):
        free = (lane for lane, end in enumerate(busy_until) if end <= first)
        lane = next(free, len(busy_until))
        busy_until[lane : lane + 1] = [last]
        chosen[way] = lane
    return chosen


Key = tuple[str, int, int | None]  # request, attempt, item where the rule asks for it


def arrows(placed: Sequence[Placed], rules: Sequence[Rule] = ARROWS) -> Iterator[Arrow]:
    """One arrow into each hop that a rule names, for each thing on its way that let it go on."""
    by_name: dict[tuple[Kind, str], list[Placed]] = {}
    for each in placed:
        by_name.setdefault((each.hop.kind, each.hop.name), []).append(each)
    for rule in rules:
        yield from _arrows_of(rule, by_name.get(rule.source, []), by_name.get(rule.target, []))


def _arrows_of(rule: Rule, sources: Sequence[Placed], targets: Sequence[Placed]) -> Iterator[Arrow]:
    key = _key_with_item if rule.same_item else _key
    ways: dict[Key, dict[tuple[int, int | None], list[Placed]]] = {}
    for source in sources:
        # One arrow for each picture, however often its hop was tried; one where there are none.
        ways.setdefault(key(source.hop), {}).setdefault((source.rank, source.hop.item), []).append(source)
    for target in targets:
        for tries in ways.get(key(target.hop), {}).values():
            yield Arrow(_latest_before(tries, target.began), target)


def _latest_before(tries: Sequence[Placed], moment: int) -> Placed:
    ordered = sorted(tries, key=_began)
    return ordered[max(0, bisect_right(ordered, moment, key=_began) - 1)]


def _began(placed: Placed) -> int:
    return placed.began


def _key(hop: Hop) -> Key:
    return hop.request, hop.attempt, None


def _key_with_item(hop: Hop) -> Key:
    return hop.request, hop.attempt, hop.item
