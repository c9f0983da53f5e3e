"""WHAT a rank runs: the interface between the plan and an engine. Knows nothing of where it runs."""

from __future__ import annotations

from typing import Protocol

from epdctl.topology.plan import PlannedRank

__all__ = ["Adapter"]


class Adapter(Protocol):
    """Built as ``Adapter(environ)`` from the environment that the ranks may inherit from."""

    def command(self, rank: PlannedRank) -> PlannedRank:
        """``rank`` with its service, ``argv`` and complete ``env``. Pure: the same rank gives the same command."""
        ...
