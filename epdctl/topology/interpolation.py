"""``${VAR}``, ``${VAR:-default}``, ``${VAR:?message}`` and ``$$``, without moving anything in the file.

References are masked before YAML reads the text: each is replaced by private-use characters, as many as it had. So
lines and columns stay true, a reference may stand inside ``[…]`` or hold ``: `` and `` #``, one in a comment is never
looked up, and the value of a variable can never be read as YAML syntax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from epdctl.topology.document import Place

__all__ = ["Masked", "Reference", "UnresolvedError", "mask", "place_of", "resolve"]

_REFERENCE = re.compile(r"\$(?:\$|\{[^}\n]*\}|\{|[A-Za-z_]\w*)")
_BODY = re.compile(r"^(?P<name>[A-Za-z_]\w*)(?:(?P<kind>:-|:\?)(?P<rest>.*))?$", re.DOTALL)
_FIRST, _BASE, _FILL = 0xE000, 6000, "\uf8ff"  # a mask: two digits to the base 6000, then filling
_MASK = re.compile(r"([\ue000-\uf76f])([\ue000-\uf76f])\uf8ff*")
RESERVED = re.compile(r"[\ue000-\uf8ff]")


class UnresolvedError(Exception):
    """A reference that has no value; carries problem and remedy to where the place is known."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Reference:
    text: str  # as written: "${PORT:-8000}"
    place: Place


@dataclass(frozen=True, slots=True)
class Masked:
    """A text whose references are hidden; same length, same line breaks."""

    text: str
    references: tuple[Reference, ...]

    def unmask(self, text: str, value: Callable[[Reference], str]) -> str:
        """``text``: a piece of the masked text, with every reference replaced by its ``value``."""
        return _MASK.sub(lambda match: value(self.references[_index(match)]), text)


def mask(text: str) -> Masked:
    references: list[Reference] = []

    def hide(match: re.Match[str]) -> str:
        index = len(references)
        references.append(Reference(match[0], place_of(text, match.start())))
        digits = chr(_FIRST + index // _BASE) + chr(_FIRST + index % _BASE)
        return digits + _FILL * (len(match[0]) - 2)

    return Masked(_REFERENCE.sub(hide, text), tuple(references))


def resolve(reference: str, environ: Mapping[str, str]) -> str:
    """The text that stands for ``reference``. Raises UnresolvedError."""
    if reference == "$$":
        return "$"
    if not reference.endswith("}"):
        raise _unfinished(reference)
    body = reference[2:-1]
    match = _BODY.match(body)
    if match is None or "${" in body:
        raise UnresolvedError(f"{reference} is not a reference", "write ${VAR}, ${VAR:-default} or ${VAR:?message}")
    return _look_up(match["name"], match["kind"], match["rest"], environ)


def place_of(text: str, offset: int) -> Place:
    return Place(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


def _unfinished(reference: str) -> UnresolvedError:
    if reference == "${":
        return UnresolvedError("${ is never closed on this line", "write ${VAR}, or $${ for the characters themselves")
    return UnresolvedError(f"{reference} is not a reference", f"write ${{{reference[1:]}}}, or $$ for a dollar sign")


def _look_up(name: str, kind: str | None, rest: str | None, environ: Mapping[str, str]) -> str:
    value = environ.get(name)
    if kind == ":-":
        return value or rest or ""
    if kind == ":?":
        if not value:
            raise UnresolvedError(rest or f"{name} is not set", f"set {name} in the environment")
        return value
    if value is None:
        raise UnresolvedError(f"{name} is not set", f"set it in the environment, or write ${{{name}:-default}}")
    return value


def _index(match: re.Match[str]) -> int:
    return (ord(match[1]) - _FIRST) * _BASE + ord(match[2]) - _FIRST
