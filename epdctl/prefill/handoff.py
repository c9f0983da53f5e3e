"""Prefill's half of the handoff, as far as it is pure: does decode's lease fit, and which pages go when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epdctl.engine.pages import pages_for
from epdctl.errors import DeadlineExceeded, LeaseExpired, PeerGone, StaleGeneration, TransferError, WireError
from epdctl.rank.admission import Refusal
from epdctl.wire.encode import FailureKind
from epdctl.wire.serve import KvLayout, KvLease
from epdctl.wire.sockets import Sender

__all__ = ["Offer", "Outgoing", "misfit", "why_not_written"]


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


def misfit(own: KvLayout, offer: KvLease, prompt_pages: int) -> Refusal | None:
    """Why this lease cannot take the pages of a rank whose layout is ``own``."""
    if offer.layout != own:
        differences = ", ".join(_differences(own, offer.layout))
        text = f"the KV layouts of prefill and {offer.lease.pool.owner} differ: {differences}"
        return Refusal(FailureKind.INTERNAL, f"{text}; both stages must run the same model and page_size")
    extents = offer.lease.extents
    if len(extents) < prompt_pages or any(extent.nbytes != own.page_bytes for extent in extents):
        sizes = sorted({extent.nbytes for extent in extents})
        text = f"{offer.lease.pool.owner} leased {len(extents)} pages of {sizes} bytes"
        return Refusal(FailureKind.INTERNAL, f"{text}; the prompt has {prompt_pages} of {own.page_bytes}")
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
