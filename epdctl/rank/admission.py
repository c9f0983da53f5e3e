"""Who may start next: first come, first served, and all that a sequence will ever need in one grant. Pure.

The rules together exclude a deadlock: a waiting sequence holds nothing, a granted one never asks again, and what no
empty rank could hold is refused at the door.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from epdctl.transfer.allocators import ALIGNMENT
from epdctl.wire.encode import FailureKind

__all__ = ["Capacity", "Line", "Need", "Refusal"]


@dataclass(frozen=True, slots=True)
class Need:
    """What one sequence takes for its whole life; ``slots``: bytes of each of its embeddings."""

    pages: int
    slots: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a piece of work ends here."""

    kind: FailureKind
    text: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a rank has when nothing runs on it. ``stage``: what it is called in a topology."""

    pages: int
    slot_bytes: int = 0
    stage: str = "<stage>"

    def refusal(self, need: Need) -> Refusal | None:
        """Set when ``need`` does not fit an empty rank, so that waiting would be for ever."""
        if need.pages > self.pages:
            return Refusal(
                FailureKind.TOO_LARGE,
                f"prompt and answer need {need.pages} KV pages; this rank has {self.pages} "
                f"(stages.{self.stage}.kv_tokens)",
            )
        if (wanted := sum(_aligned(slot) for slot in need.slots)) > self.slot_bytes:
            return Refusal(
                FailureKind.TOO_LARGE,
                f"the embeddings of this request need {wanted} bytes; the pool of this rank has {self.slot_bytes} "
                "(transfer.embedding_pool)",
            )
        return None


K = TypeVar("K")
G = TypeVar("G")


class Line(Generic[K]):
    """The bounded queue before a rank's memory. It keeps names, never memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[K, None] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def join(self, key: K) -> Refusal | None:
        """Stand last in line; or the reason why not."""
        if len(self._waiting) >= self._limit:
            return Refusal(FailureKind.FULL, f"{len(self._waiting)} requests wait already (limits.queue)")
        self._waiting[key] = None
        return None

    def leave(self, key: K) -> None:
        """Fine for one that is not in line."""
        self._waiting.pop(key, None)

    def serve(self, take: Callable[[K], G | None]) -> Iterator[tuple[K, G]]:
        """Grant from the head on, up to the first that ``take`` cannot serve: nobody overtakes it.

        ``take`` gives all that one needs, or nothing (None).
        """
        while self._waiting:
            key = next(iter(self._waiting))
            grant = take(key)
            if grant is None:
                return
            del self._waiting[key]
            yield key, grant


def _aligned(nbytes: int) -> int:
    """What a slot really takes, so that what passes here fits an empty pool."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
