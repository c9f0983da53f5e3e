"""Writers of one lease take turns: what is known of a lease that is being written to, while somebody writes to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from epdctl.wire.transfer import Extent

__all__ = ["Slot", "Turn"]


@dataclass(slots=True)
class Slot:
    """One lease that is being written to: its writes go one after another."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    opened: int | None = None  # the number of the write that has begun
    kept: asyncio.Future[None] | None = None  # ``open_slot`` began it, which counts as a user until it is ended
    extents: Sequence[Extent] = ()

    def keep(self) -> asyncio.Future[None]:
        """Done when what was opened is ended."""
        self.users += 1
        self.kept = asyncio.get_running_loop().create_future()
        return self.kept

    def end(self) -> int:
        """The number of the write that ends here."""
        assert self.opened is not None, "a write that has not begun"
        number, self.opened = self.opened, None
        if self.kept is not None:
            self.users -= 1
            if not self.kept.done():
                self.kept.set_result(None)
            self.kept = None
        return number


class Turn:
    """The right to write into one lease; the record of it goes with its last user. ``slots``: by generation."""

    def __init__(self, slots: dict[int, Slot], generation: int) -> None:
        self._slots = slots
        self._generation = generation

    async def __aenter__(self) -> Slot:
        slot = self._slots.setdefault(self._generation, Slot())
        slot.users += 1
        try:
            await slot.lock.acquire()
        except BaseException:
            self._leave(slot)
            raise
        return slot

    async def __aexit__(self, *_: object) -> None:
        slot = self._slots[self._generation]
        slot.lock.release()
        self._leave(slot)

    def _leave(self, slot: Slot) -> None:
        slot.users -= 1
        if not slot.users:
            del self._slots[self._generation]
