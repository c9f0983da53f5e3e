"""What is to be written, as addresses."""

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
    """One for each of ``puts``, when it is asked for; ``base``: the address of the peer's pool."""
    return (Run(put.data.data_ptr(), base + put.place, put.data.numel()) for put in puts)
