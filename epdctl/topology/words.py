"""Did you mean …?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["closest"]


def closest(word: str, words: Iterable[str]) -> str | None:
    """The one of ``words`` that was probably meant."""
    known = list(words)
    plain = {name.lower().replace("_", "-"): name for name in known}
    near = difflib.get_close_matches(word.lower().replace("_", "-"), plain, 1, 0.6)
    return plain[near[0]] if near else None
