"""Ranks with a tower, asked to encode their canary now: what each said of itself, or that it said nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from epdctl.ids import Incarnation, RankName
from epdctl.wire.lifecycle import Prove, Proved, SupervisorToRank

__all__ = ["Finding", "Proofs", "Ranks"]

Who = tuple[RankName, Incarnation, int]  # the question's number


class Ranks(Protocol):
    def connected(self, rank: RankName) -> Incarnation | None:
        """The incarnation that can be spoken to; None when the rank has none."""
        ...

    def tell(self, rank: RankName, message: SupervisorToRank) -> None: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with ``rank``. Unless it is ``unfit`` by its own word, nobody knows how it sees."""

    rank: RankName
    text: str
    unfit: bool


class Proofs:
    """The questions that are out. Made inside a running event loop."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._numbers = itertools.count(1)
        self._out: dict[Who, asyncio.Future[Finding | None]] = {}

    async def ask(self, ranks: Sequence[RankName], seconds: float) -> list[Finding]:
        """All at once; those that are fit are left out, and so are those that real work kept from it."""
        found = await asyncio.gather(*(self._ask(rank, seconds) for rank in ranks))
        return [finding for finding in found if finding is not None]

    async def _ask(self, rank: RankName, seconds: float) -> Finding | None:
        incarnation = self._ranks.connected(rank)
        if incarnation is None:
            return Finding(rank, "it is not running", unfit=False)
        who = rank, incarnation, next(self._numbers)
        answer: asyncio.Future[Finding | None] = asyncio.get_running_loop().create_future()
        self._out[who] = answer
        self._ranks.tell(rank, Prove(number=who[2]))
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            return Finding(rank, f"asked to prove itself, it did not answer within {seconds:.1f} s", unfit=False)
        finally:
            del self._out[who]

    def heard(self, rank: RankName, incarnation: Incarnation, message: Proved) -> None:
        """An answer that comes too late is for nobody."""
        answer = self._out.get((rank, incarnation, message.number))
        if answer is not None and not answer.done():
            answer.set_result(None if message.fault is None else Finding(rank, message.fault, unfit=True))

    def died(self, rank: RankName, incarnation: Incarnation) -> None:
        for who, answer in self._out.items():
            if who[:2] == (rank, incarnation) and not answer.done():
                answer.set_result(Finding(rank, "it ended while it was to prove itself", unfit=False))
