"""How many waiting items go into one forward. Pure."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["fitting"]


def fitting(patches: Iterable[int], budget: int) -> int:
    """How many items from the front fit ``budget`` patches together: at least one, so that a large one is not stuck.

    In order of arrival: a small item never overtakes, so none waits for ever.
    """
    count = total = 0
    for size in patches:
        total += size
        if count and total > budget:
            break
        count += 1
    return count
