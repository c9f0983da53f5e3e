"""Prefill's half of the handoff, as far as it is pure: does decode's lease fit, and which pages go when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from epdctl.engine.pages import pages_for
from epdctl.errors import DeadlineExceeded, LeaseExpired, PeerGone, StaleGeneration, TransferError, WireError
from epdctl.rank.admission import Refusal
from epdctl.wire.encode import FailureKind
from epdctl.wire.serve import KvLayout, KvLease
from epdctl.wire.sockets import Sender
from epdctl.wire.transfer import Extent

__all__ = ["Offer", "Outgoing", "Stretch", "misfit", "stretches", "why_not_written"]


@dataclass(frozen=True, slots=True)
class Offer:
    """Decode's pages for one room, and where the answer goes."""

    sender: Sender
    kv: KvLease


@dataclass(slots=True)
class Outgoing:
    """How far the pages of one prompt are: ``sent`` ≤ ``complete`` ≤ ``total``, in pages.

    A page goes out once and whole: it is complete when its last token, or the prompt's, has its KV.
    """

    prompt_tokens: int
    page_size: int
    sent: int = 0
    complete: int = 0

    @property
    def total(self) -> int:
        return pages_for(self.prompt_tokens, self.page_size)

    def computed(self, tokens: int) -> None:
        """The KV of the first ``tokens`` tokens is in the pages."""
        self.complete = self.total if tokens >= self.prompt_tokens else tokens // self.page_size

    def due(self) -> range:
        """Pages, by their place in the prompt, that may go now."""
        return range(self.sent, self.complete)

    @property
    def done(self) -> bool:
        return self.sent == self.total


class Stretch(NamedTuple):
    """Pages that lie side by side at both ends: at ``source`` in our pool, ``offset`` bytes into decode's extent."""

    source: int
    extent: int
    offset: int
    nbytes: int


def stretches(own: Sequence[int], due: range, extents: Sequence[Extent], page_bytes: int) -> Iterator[Stretch]:
    """How the pages ``due``, by their place in the prompt, go: ``own`` are their numbers here, in order of the prompt,
    and ``extents`` decode's, each of whole pages. As few as can be: what lies side by side is moved as one piece.
    """
    ways = zip(own[due.start : due.stop], _places(extents, due, page_bytes), strict=True)
    for (extent, _), run in itertools.groupby(ways, key=lambda way: (way[1][0], way[0] - way[1][1])):
        pages = list(run)
        page, (_, place) = pages[0]
        yield Stretch(page * page_bytes, extent, place * page_bytes, len(pages) * page_bytes)


def _places(extents: Sequence[Extent], due: range, page_bytes: int) -> Iterator[tuple[int, int]]:
    """Of each page ``due``: the number of its extent, and which of that extent's pages it is."""
    first = 0
    for number, extent in enumerate(extents):
        pages = extent.nbytes // page_bytes
        for page in range(max(due.start - first, 0), min(due.stop - first, pages)):
            yield number, page
        first += pages


def misfit(own: KvLayout, offer: KvLease, prompt_pages: int) -> Refusal | None:
    """Why this lease cannot take the pages of a rank whose layout is ``own``."""
    if offer.layout != own:
        differences = ", ".join(_differences(own, offer.layout))
        text = f"the KV layouts of prefill and {offer.lease.pool.owner} differ: {differences}"
        return Refusal(FailureKind.INTERNAL, f"{text}; both stages must run the same model and page_size")
    sizes = [extent.nbytes for extent in offer.lease.extents]
    if sum(sizes) < prompt_pages * own.page_bytes or any(size % own.page_bytes for size in sizes):
        text = f"{offer.lease.pool.owner} leased {sum(sizes)} bytes in pieces of {sorted(set(sizes))}"
        return Refusal(FailureKind.INTERNAL, f"{text}; the prompt has {prompt_pages} pages of {own.page_bytes}")
    return None


def _differences(own: KvLayout, other: KvLayout) -> Iterator[str]:
    for name in KvLayout.__struct_fields__:
        mine, theirs = getattr(own, name), getattr(other, name)
        if mine != theirs:
            yield f"{name} {mine} here, {theirs} there"


def why_not_written(error: TransferError | WireError, owner: str) -> Refusal:
    """What a failed write means to the request."""
    match error:
        case PeerGone() | StaleGeneration() | LeaseExpired():
            return Refusal(FailureKind.RANK_LOST, f"{owner} took no more pages of the prompt: {error.message}")
        case DeadlineExceeded():
            return Refusal(FailureKind.DEADLINE, f"its time ended while its KV went to {owner}: {error.message}")
        case _:
            return Refusal(FailureKind.INTERNAL, f"its KV did not reach {owner}: {error.message}")
