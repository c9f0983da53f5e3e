"""What prefill and language ranks have in common: a prompt whose embeddings come from elsewhere, into slots of ours.

A slot is read by the engine from the admission of its sequence until the prompt is computed; it is free before that
only if the engine never saw it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from epdctl.engine.api import NewSequence
from epdctl.engine.pages import pages_for
from epdctl.errors import PoolExhausted, TransferError
from epdctl.rank.admission import Capacity, Need, Refusal
from epdctl.rank.language import In, LanguageRank
from epdctl.rank.sequences import Grant, Phase, Stay
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.leases import Lease, SlotState
from epdctl.transfer.pool import Pool
from epdctl.wire.encode import EmbeddingLanded, FailureKind
from epdctl.wire.serve import Generate, Granted, Prefill, PromptItem, Sampling
from epdctl.wire.transfer import TensorSpec

__all__ = ["PromptRank", "PromptStay", "fault"]

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class PromptStay(Stay):
    """A stay that starts with a prompt.

    ``answer_tokens``: how many the engine is to sample here. ``missing``: items whose embeddings have not landed.
    """

    tokens: Sequence[int]
    items: Sequence[PromptItem]
    sampling: Sampling
    answer_tokens: int
    missing: set[int]
    embeddings: dict[int, torch.Tensor] = field(default_factory=dict)


S = TypeVar("S", bound=PromptStay)


class PromptRank(LanguageRank[S, In]):
    """Adds the embedding pool, Granted and EmbeddingLanded to a language rank."""

    _slots: Pool

    def _new_sequence(self, stay: S, new_tokens: int) -> NewSequence:
        return NewSequence(
            id=stay.name,
            tokens=stay.tokens,
            items=stay.items,
            embeddings=dict(stay.embeddings),
            sampling=stay.sampling,
            pages=stay.holding().pages,
            max_new_tokens=new_tokens,
        )

    def _pools(self) -> Sequence[Pool]:
        nbytes = self._spec.config.transfer.embedding_bytes
        memory = self.machine.transport.allocate(nbytes, self.machine.loaded.kv.device)
        self._slots = Pool("embeddings", memory, RangeAllocator(nbytes))
        return [self._slots]

    @property
    def _capacity(self) -> Capacity:
        return Capacity(self.machine.pages.total, self._slots.allocator.total, self._spec.config.stage)

    def _need(self, message: Prefill | Generate, answer: int) -> Need:
        """Pages for the prompt and ``answer`` tokens that are computed here too, and a slot per item."""
        row = self._row_bytes
        pages = pages_for(len(message.tokens) + answer, self.machine.page_size)
        return Need(pages, tuple(item.rows * row for item in message.items))

    @property
    def _row_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self._spec.config.model.dtype)
        return self.machine.loaded.width * dtype.itemsize

    def _take(self, stay: S) -> Grant | None:
        if self._full(stay.need):
            return None
        try:
            slots = self._slots.lease_all(stay.need.slots, stay.name, seconds=self._left(stay))
        except PoolExhausted:
            return None
        return Grant(self.machine.pages.take(stay.need.pages), slots)

    def _release(self, stay: S, grant: Grant) -> None:
        self._free_slots(grant.leases)
        self.machine.pages.give(grant.pages)

    def _granted(self, stay: S) -> None:
        address = self._addresses[self._slots.name]
        slots = [lease.remote(address) for lease in stay.holding().leases]
        self._tell(
            stay,
            Granted(request=stay.request, attempt=stay.attempt, slots=slots, notify=self.inbox.endpoint),
        )
        self._run_when_whole(stay)

    def _landed(self, message: EmbeddingLanded) -> None:
        """One embedding may be read. Of a slot that belongs to nobody or to somebody else by now: dropped."""
        stay = self._find(message.request, message.attempt)
        item = None if stay is None else _item_of(stay, message)
        if stay is None or item is None:
            log.warning("an embedding of %s (item %d) came for a slot it has not", message.request, message.index)
            return
        try:
            lease = self._slots.filled(message.lease, message.generation)
            stay.embeddings[item.index] = self._view(lease, item, message.spec)
        except TransferError as error:
            self._end(stay, Refusal(FailureKind.INTERNAL, f"item {item.index}: {error.message}"))
            return
        stay.missing.discard(item.index)
        if stay.way is not None:
            stay.way.within(f"item {item.index}")  # from the lease to its bytes
        self._run_when_whole(stay)

    def _view(self, lease: Lease, item: PromptItem, spec: TensorSpec) -> torch.Tensor:
        """Raises TransferError when the encoder made something else than the prompt has room for."""
        expected = [item.rows, self.machine.loaded.width]
        if spec.shape != expected or spec.dtype != self._spec.config.model.dtype:
            raise TransferError(
                f"the encoder wrote {spec.shape} of {spec.dtype}, the prompt takes {expected} of "
                f"{self._spec.config.model.dtype}; both ranks must run the same model"
            )
        return self._slots.tensor(lease, spec)

    def _run_when_whole(self, stay: S) -> None:
        if stay.missing or stay.phase is not Phase.GRANTED:
            return
        for lease in stay.holding().leases:
            self._slots.hold(lease.id)
        self._run(stay, self._new_sequence(stay, stay.answer_tokens))

    def _prompt_done(self, stay: S) -> None:
        """The engine has read every embedding: their slots are for the next request."""
        grant = stay.holding()
        if grant.leases:
            self._free_slots(grant.leases)
            stay.grant = replace(grant, leases=())
            stay.embeddings.clear()
            self._serve_soon()

    def _free_slots(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            if self._slots.leases.state(lease.id) is SlotState.IN_FLIGHT:
                self._slots.let_go(lease.id)
            self._slots.release(lease.id)

    def check(self) -> None:
        super().check()
        self._slots.check()
        held = sum(len(stay.grant.leases) for stay in self._stays.values() if stay.grant is not None)
        quarantined = len(self._slots.leases.live(SlotState.QUARANTINED))
        assert len(self._slots.leases) == held + quarantined, "an embedding slot belongs to nobody"


def _item_of(stay: PromptStay, message: EmbeddingLanded) -> PromptItem | None:
    """The item of ``stay`` that the message is about, if it names that item's slot and no earlier one."""
    leases = () if stay.grant is None else stay.grant.leases
    for item, slot in zip(stay.items, leases, strict=False):  # no slots any more once the prompt is done
        if (item.index, slot.id, slot.generation) == (message.index, message.lease, message.generation):
            return item
    return None


def fault(message: Prefill | Generate) -> Refusal | None:
    """What the engine would take for a mistake of this rank."""
    if not message.tokens or message.sampling.max_tokens < 1:
        return Refusal(FailureKind.INTERNAL, "a prompt without tokens, or an answer without room for one")
    if len({item.index for item in message.items}) != len(message.items):
        return Refusal(FailureKind.INTERNAL, "two items of this request have the same index")
    return None
