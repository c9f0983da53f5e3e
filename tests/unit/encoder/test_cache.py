"""The embedding cache against a model of it, and what its keys tell apart."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epdctl.encoder.cache import Cache, EmbeddingKey, key_of
from epdctl.ids import Modality
from epdctl.wire.encode import MediaItem

ITEM = MediaItem(index=3, modality=Modality.IMAGE, content_hash="ab", of=2, grid=[1, 4, 6], rows=6)


def key(name: str) -> EmbeddingKey:
    return EmbeddingKey(name, "image", (1, 2, 2), 1)


@settings(max_examples=200, deadline=None)
@given(
    limit=st.integers(0, 20),
    orders=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 25), st.booleans()), max_size=60),
)
def test_it_keeps_what_was_used_last_and_never_more_than_its_bytes(
    limit: int, orders: list[tuple[str, int, bool]]
) -> None:
    cache: Cache[int] = Cache(limit)
    kept: dict[str, int] = {}  # the least recently used first
    for name, nbytes, put in orders:
        if put and nbytes <= limit:
            kept.pop(name, None)
            kept[name] = nbytes
            while sum(kept.values()) > limit:
                kept.pop(next(iter(kept)))
        if put:
            cache.put(key(name), nbytes, nbytes)
        else:
            assert cache.get(key(name)) == kept.get(name)
            if name in kept:
                kept[name] = kept.pop(name)
        cache.check()
        assert (cache.bytes, len(cache)) == (sum(kept.values()), len(kept))


@pytest.mark.parametrize("changed", [{"content_hash": "cd"}, {"modality": "audio"}, {"grid": [1, 6, 4]}, {"rows": 5}])
def test_whatever_changes_an_embedding_changes_its_key(changed: dict) -> None:
    assert key_of(msgspec.structs.replace(ITEM, **changed)) != key_of(ITEM)


def test_the_rest_of_its_request_changes_nothing_and_an_item_without_a_hash_is_like_no_other() -> None:
    """Every turn of a chat with one picture more missed what the turns before it had left."""
    assert key_of(msgspec.structs.replace(ITEM, index=0, of=5)) == key_of(ITEM)
    assert key_of(msgspec.structs.replace(ITEM, content_hash="")) is None
