"""A Document against the schema: pydantic's findings, put into place, value and remedy.

After a mistake the data is mended (typos renamed, wrong values dropped) and validated again, so that what
stands below a misspelt key and the checks that need a whole topology are reported in the same pass.
"""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from epdctl.errors import Mistake
from epdctl.topology import names
from epdctl.topology.document import Document, Trail
from epdctl.topology.reading import Parsed
from epdctl.topology.schema import TopologyFile
from epdctl.topology.words import closest

__all__ = ["Validated", "validate"]

_ROUNDS = 5  # of validating and mending; typos nest no deeper than a topology does
_STAND_INS: Mapping[Trail, object] = {("model",): {"path": "unknown"}, ("model", "path"): "unknown"}
_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_PATTERNS = {"cluster": names.RULE}
_MEANT: Mapping[Trail, str] = {("model",): "path", ("transfer",): "backend"}  # the key of a mapping written as a text
_EMPTY = {
    "string_too_short": ("should not be empty", None),
    "too_short": ("should name at least one GPU", "write auto, none, or a list like [0, 1]"),
}


@dataclass(frozen=True, slots=True)
class Validated:
    """``file`` is None when the topology is too broken to be checked further. ``touched``: where mistakes are."""

    file: TopologyFile | None
    document: Document  # knows a misspelt key by its right name as well
    mistakes: tuple[Mistake, ...]
    touched: frozenset[Trail]


def validate(parsed: Parsed) -> Validated:
    document, broken = parsed.document, set(parsed.broken)
    data = {key: value for key, value in document.data.items() if not key.startswith("x-")}
    mistakes: list[Mistake] = []
    touched: set[Trail] = set()
    for _ in range(_ROUNDS):
        file, errors = _try(data)
        if file is not None:
            return Validated(file, document, tuple(mistakes), frozenset(touched | broken))
        renames = dict(_renames(data, errors))
        for trail, error in ((_trail(data, error), error) for error in errors):
            touched.add(trail)
            if trail not in broken and not (error["type"] == "missing" and trail in renames.values()):
                mistakes.append(_mistake(document, trail, error))
        data = _mended(data, errors, renames)
        for old, new in renames.items():
            document = document.renamed(old, new)
            broken |= {new + trail[len(old) :] for trail in broken if trail[: len(old)] == old}
    return Validated(None, document, tuple(mistakes), frozenset(touched | broken))


def _try(data: dict[str, object]) -> tuple[TopologyFile | None, list[ErrorDetails]]:
    try:
        return TopologyFile.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _trail(data: object, error: ErrorDetails) -> Trail:
    """Pydantic's location without the names of union branches, which are no part of the file."""
    trail: list[str | int] = []
    for step in error["loc"]:
        if isinstance(data, dict) and isinstance(step, str):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int):
            data = data[step]
        else:
            continue
        trail.append(step)
    return tuple(trail)


def _mistake(document: Document, trail: Trail, error: ErrorDetails) -> Mistake:
    if error["type"] == "extra_forbidden":
        known = _known_keys(trail[:-1])
        return document.mistake(trail, f"unknown key {trail[-1]!r}", _did_you_mean(str(trail[-1]), known), key=True)
    if error["type"] == "missing":
        return document.mistake(trail, "is missing", f"add {_example(trail)}")
    problem, remedy = _explain(trail, error)
    found = "a text that is not shown" if trail[-1:] == ("api_key",) else _shown(error["input"])
    return document.mistake(trail, f"{problem}, found {found}", remedy)


def _explain(trail: Trail, error: ErrorDetails) -> tuple[str, str | None]:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "epdctl":
        return context["problem"], context["remedy"]
    if kind in _WANTED:
        key = _MEANT.get(trail) if isinstance(error["input"], str) else None
        remedy = f"write {trail[-1]}: {{{key}: {error['input']}}}" if key else _typed_remedy(kind, error["input"])
        return f"should be {_WANTED[kind]}", remedy
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"should be {words} {context[key]:g}", None
    if kind == "literal_error":
        return _wrong_word(str(context["expected"]), error["input"])
    if kind == "string_pattern_mismatch":
        return "is not a name that can be used here", _PATTERNS.get(str(trail[-1]))
    return _EMPTY.get(kind) or (error["msg"][0].lower() + error["msg"][1:], None)


def _wrong_word(expected: str, found: object) -> tuple[str, str | None]:
    words = re.findall(r"'([^']*)'", expected)
    if not words:
        return f"should be {expected}", f"write {expected}"
    near = closest(found, words) if isinstance(found, str) else None
    return f"should be {expected}", f"did you mean {near!r}?" if near else None


def _typed_remedy(kind: str, found: object) -> str | None:
    if isinstance(found, str) and kind in ("int_type", "float_type", "bool_type") and _reads_as(kind, found):
        return f"write {found} without quotes"
    if kind == "string_type" and isinstance(found, int | float):
        return f'write "{found}" in quotes' if not isinstance(found, bool) else None
    if kind == "int_type" and isinstance(found, float):
        return f"write {round(found)}"
    return None


def _reads_as(kind: str, text: str) -> bool:
    if kind == "bool_type":
        return text in ("true", "false")
    return re.fullmatch(r"-?(0|[1-9]\d*)" if kind == "int_type" else r"-?(0|[1-9]\d*)(\.\d+)?", text) is not None


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return _shortened("[" + ", ".join(_shown(item) for item in value[:20]) + "]")
    return _shortened(f"the text {value!r}" if isinstance(value, str) else f"{value}")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = closest(word, known)
    return f"did you mean {near!r}?" if near else f"known here: {', '.join(known)}"


def _known_keys(trail: Trail) -> list[str]:
    section = _section(trail)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _section(trail: Trail) -> type[BaseModel] | None:
    """The model of the mapping at ``trail``."""
    section: type[BaseModel] | None = TopologyFile
    for step in trail:
        field = section.model_fields.get(str(step)) if section else None
        section = _model_in(field.annotation) if field else None
    return section


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in typing.get_args(annotation) if (model := _model_in(part))), None)


def _example(trail: Trail) -> str:
    return {
        ("model",): "model: {path: <directory or hub id>}",
        ("model", "path"): "path: <directory or hub id>",
    }.get(tuple(map(str, trail)), f"{trail[-1]}: …")


def _renames(data: dict[str, object], errors: Sequence[ErrorDetails]) -> Iterator[tuple[Trail, Trail]]:
    """Unknown keys that were surely meant to be a known one which is not there."""
    for error in errors:
        trail = _trail(data, error)
        near = closest(str(trail[-1]), _known_keys(trail[:-1])) if error["type"] == "extra_forbidden" else None
        if near and near not in _parent(data, trail):
            yield trail, (*trail[:-1], near)


def _mended(
    data: dict[str, object], errors: Sequence[ErrorDetails], renames: Mapping[Trail, Trail]
) -> dict[str, object]:
    """The same data with each mistake taken out, for the checks only; nothing mended ever leaves this module."""
    data = copy.deepcopy(data)
    for trail in (_trail(data, error) for error in errors):
        while trail and isinstance(trail[-1], int):  # an item of a list: the whole list goes
            trail = trail[:-1]
        if not trail:
            continue
        parent, name = _parent(data, trail), str(trail[-1])
        value = parent.pop(name, None)
        if trail in renames:
            parent[str(renames[trail][-1])] = value
        elif trail in _STAND_INS and trail not in renames.values():
            parent[name] = _STAND_INS[trail]
    return data


def _parent(data: dict[str, object], trail: Trail) -> dict[str, object]:
    """The mapping that holds the last step of ``trail``; an empty one when it was taken out before."""
    parent: object = data
    for step in trail[:-1]:
        parent = parent.get(str(step)) if isinstance(parent, dict) else None
    return parent if isinstance(parent, dict) else {}
