"""What was encoded before, by what it was made of: at most so many bytes, the least recently used go first. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

from epdctl.wire.encode import MediaItem

__all__ = ["Cache", "EmbeddingKey", "key_of"]

V = TypeVar("V")


class EmbeddingKey(NamedTuple):
    """All that an embedding depends on but the model and its processor, which are a process's own and never change.

    How many media a request has is not among it: a family that treats a lone picture otherwise (LLaVA-OneVision tiles
    it) gives it another grid, and the chat that goes on finds its first picture again when it has two.
    """

    content_hash: str
    modality: str
    grid: tuple[int, ...]
    rows: int


def key_of(item: MediaItem) -> EmbeddingKey | None:
    """None for an item whose content nobody has named: it is like no other."""
    if not item.content_hash:
        return None
    return EmbeddingKey(item.content_hash, item.modality, tuple(item.grid), item.rows)


class Cache(Generic[V]):
    """``limit``: bytes; what is larger than that alone is not kept. 0: nothing is."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[EmbeddingKey, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: EmbeddingKey) -> V | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: EmbeddingKey, value: V, nbytes: int) -> None:
        if nbytes > self.limit:
            return
        self.bytes += nbytes - self._kept.get(key, (None, 0))[1]
        self._kept[key] = (value, nbytes)
        self._kept.move_to_end(key)
        while self.bytes > self.limit:
            self.bytes -= self._kept.popitem(last=False)[1][1]

    def check(self) -> None:
        """Raises AssertionError when the count of bytes is not theirs, or above the limit."""
        assert self.bytes == sum(nbytes for _, nbytes in self._kept.values()) <= max(0, self.limit), "bytes are off"
