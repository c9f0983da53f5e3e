"""Which bytes of a pool are free: a range allocator for embeddings, and a coat for a page allocator. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from epdctl.errors import PoolExhausted, TransferError
from epdctl.wire.transfer import Extent

__all__ = ["ALIGNMENT", "Allocator", "PageExtents", "Pages", "RangeAllocator"]

ALIGNMENT = 256  # bytes; every dtype's and every device's loads are aligned by it


class Allocator(Protocol):
    """Amounts are in the allocator's own unit: bytes or pages."""

    @property
    def free(self) -> int: ...

    @property
    def total(self) -> int: ...

    def take(self, amount: int) -> Sequence[Extent]:
        """Raises PoolExhausted, changing nothing."""
        ...

    def give(self, extents: Sequence[Extent]) -> None:
        """Take back exactly what one ``take`` returned."""
        ...

    def held(self, extents: Sequence[Extent]) -> int:
        """How much of ``total`` these keep from ``free``."""
        ...


def _room(nbytes: int) -> int:
    """What a range of so many bytes takes."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class RangeAllocator:
    """Contiguous ranges, first fit, neighbours joined when they come back. Unit: bytes."""

    def __init__(self, nbytes: int) -> None:
        self.total = nbytes // ALIGNMENT * ALIGNMENT
        self._gaps = [(0, self.total)] if self.total else []  # (start, end), ascending, never touching
        self._taken: dict[int, int] = {}  # start → end

    @property
    def free(self) -> int:
        return sum(end - start for start, end in self._gaps)

    def take(self, amount: int) -> tuple[Extent]:
        """One extent of ``amount`` bytes, aligned."""
        need = _room(amount)
        for position, (start, end) in enumerate(self._gaps):
            if end - start >= need:
                self._gaps[position : position + 1] = [(start + need, end)] if end - start > need else []
                self._taken[start] = start + need
                return (Extent(offset=start, nbytes=amount),)
        raise PoolExhausted(f"no {need} contiguous bytes: {self.free} of {self.total} are free")

    def give(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            end = self._taken.pop(extent.offset, None)
            if end is None:
                raise TransferError(f"nothing was taken at offset {extent.offset}")
            self._join(extent.offset, end)

    def held(self, extents: Sequence[Extent]) -> int:
        return sum(_room(extent.nbytes) for extent in extents)

    def _join(self, start: int, end: int) -> None:
        position = bisect.bisect(self._gaps, (start, end))
        if position < len(self._gaps) and self._gaps[position][0] == end:
            end = self._gaps.pop(position)[1]
        if position and self._gaps[position - 1][1] == start:
            position -= 1
            start = self._gaps.pop(position)[0]
        self._gaps.insert(position, (start, end))

    def check(self) -> None:
        """Raises AssertionError unless free and taken ranges tile the whole and no two gaps touch."""
        ranges = sorted([*self._gaps, *self._taken.items()])
        assert sum(end - start for start, end in ranges) == self.total, "bytes were lost or made up"
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges)), "ranges overlap"
        assert all(a[1] < b[0] for a, b in itertools.pairwise(self._gaps)), "two gaps touch"


class Pages(Protocol):
    """What a page allocator offers; the engine has one."""

    @property
    def free(self) -> int: ...

    @property
    def total(self) -> int: ...

    def take(self, count: int) -> Sequence[int]:
        """Page numbers. Raises PoolExhausted."""
        ...

    def give(self, pages: Sequence[int]) -> None: ...


class PageExtents:
    """A page allocator as a pool sees it: pages in the order taken, those that lie side by side as one extent. Unit:
    pages.
    """

    def __init__(self, pages: Pages, page_bytes: int) -> None:
        self._pages = pages
        self._page_bytes = page_bytes

    @property
    def free(self) -> int:
        return self._pages.free

    @property
    def total(self) -> int:
        return self._pages.total

    def take(self, amount: int) -> list[Extent]:
        size = self._page_bytes
        return [Extent(offset=first * size, nbytes=count * size) for first, count in _joined(self._pages.take(amount))]

    def give(self, extents: Sequence[Extent]) -> None:
        self._pages.give(self.pages_of(extents))

    def held(self, extents: Sequence[Extent]) -> int:
        return sum(extent.nbytes for extent in extents) // self._page_bytes

    def pages_of(self, extents: Sequence[Extent]) -> list[int]:
        """The page numbers behind a lease's extents, in order."""
        size = self._page_bytes
        return [page for e in extents for page in range(e.offset // size, (e.offset + e.nbytes) // size)]


def _joined(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each run of consecutive numbers: its first, and how many."""
    for _, run in itertools.groupby(enumerate(pages), key=lambda placed: placed[1] - placed[0]):
        numbers = [page for _, page in run]
        yield numbers[0], len(numbers)
