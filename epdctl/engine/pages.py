"""Which pages of a KV pool are free. Pure: it counts, it touches no memory."""

from __future__ import annotations

from collections.abc import Sequence

from epdctl.errors import PoolExhausted

__all__ = ["PageAllocator", "pages_for"]


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that ``tokens`` tokens need."""
    return -(-tokens // page_size)


class PageAllocator:
    """Pages 0 … total - 1, each either free or taken. Pages that lie side by side go to a peer as one piece."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(
            range(total - 1, -1, -1)
        )  # descending: the lowest go first, so that a taker's lie side by side
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """``count`` pages or none. Raises PoolExhausted."""
        if count > len(self._free):
            raise PoolExhausted(f"{count} KV pages wanted, {len(self._free)} of {self.total} are free")
        pages = tuple(self._free.pop() for _ in range(count))
        self._taken.update(pages)
        return pages

    def give(self, pages: Sequence[int]) -> None:
        """Raises ValueError, and changes nothing, when one of them is not taken."""
        wrong = set(pages) - self._taken
        if wrong or len(set(pages)) != len(pages):
            raise ValueError(f"pages given back that nobody has: {sorted(wrong) or list(pages)}")
        self._taken.difference_update(pages)
        self._free.extend(pages)
        self._free.sort(reverse=True)

    def check(self) -> None:
        """Every page is exactly once free or taken. Raises AssertionError."""
        everything = sorted([*self._free, *self._taken])
        if everything != list(range(self.total)):
            raise AssertionError(f"{self.total} pages, yet free + taken is {everything}")
