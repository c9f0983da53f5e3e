"""One YAML file as data that remembers where everything stands, so that any later pass can point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from epdctl.errors import Mistake

__all__ = ["Document", "Place", "Trail", "dotted"]

Trail = tuple[str | int, ...]  # ("stages", "encoder", "gpus", 0)


class Place(NamedTuple):
    """Line and column, both from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """``keys`` and ``values``: where the key of a trail stands, and where its value begins."""

    file: str
    data: dict[str, object]
    keys: Mapping[Trail, Place] = field(default_factory=dict)
    values: Mapping[Trail, Place] = field(default_factory=dict)

    def place(self, trail: Trail, *, key: bool = False) -> Place:
        """Where the value (or key) of ``trail`` stands; for what is not in the file, its nearest parent's key."""
        if not key and trail in self.values:
            return self.values[trail]
        while trail:
            if trail in self.keys:
                return self.keys[trail]
            trail = trail[:-1]
        return Place(1, 1)

    def renamed(self, old: Trail, new: Trail) -> Document:
        """The same file, where what stands at ``old`` is found at ``new`` as well."""

        def moved(places: Mapping[Trail, Place]) -> dict[Trail, Place]:
            below = {new + trail[len(old) :]: place for trail, place in places.items() if trail[: len(old)] == old}
            return {**places, **below}

        return Document(self.file, self.data, moved(self.keys), moved(self.values))

    def mistake(self, trail: Trail, problem: str, remedy: str | None = None, *, key: bool = False) -> Mistake:
        return self.mistake_at(self.place(trail, key=key), trail, problem, remedy)

    def mistake_at(self, place: Place, trail: Trail, problem: str, remedy: str | None = None) -> Mistake:
        return Mistake(f"{self.file}:{place.line}:{place.column}", dotted(trail), problem, remedy)


def dotted(trail: Trail) -> str:
    """``stages.encoder.gpus[0]``"""
    text = ""
    for step in trail:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
