"""What is to be written, as addresses: as few runs of bytes as can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from epdctl.transfer.movers import Put

__all__ = ["Run", "runs"]


class Run(NamedTuple):
    """Contiguous at both ends. Addresses in their own processes, or both in the writer's."""

    source: int
    target: int
    nbytes: int


def runs(puts: Iterable[Put], base: int) -> Iterator[Run]:
    """``puts`` with neighbours joined, as they are asked for; ``base``: the address of the peer's pool."""
    source = target = nbytes = 0
    for put in puts:
        start, place, more = put.data.data_ptr(), base + put.place, put.data.numel()
        if start == source + nbytes and place == target + nbytes:
            nbytes += more
            continue
        if nbytes:
            yield Run(source, target, nbytes)
        source, target, nbytes = start, place, more
    if nbytes:
        yield Run(source, target, nbytes)
