"""What a cluster may be called: its name becomes a directory, so it must not be a path."""

from __future__ import annotations

import re

from epdctl.errors import UserError

__all__ = ["PATTERN", "RULE", "check_name"]

PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"
RULE = "up to 32 of a-z, 0-9, - and _, beginning with a letter or digit"


def check_name(name: str) -> str:
    """The name again. Raises UserError."""
    if not re.fullmatch(PATTERN, name):
        raise UserError(f"{name!r} cannot name a cluster", hint=RULE)
    return name
