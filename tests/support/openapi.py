"""Values as an OpenAPI description has them, and the same with one node changed: for tests that send anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

__all__ = ["JSON", "Described", "one_node_changed"]

Strategy = st.SearchStrategy[Any]
Path = tuple[str | int, ...]

MOST_EXTRA = 3  # fields of one object beside those that it must have; items of one list
GONE = object()

JSON: Strategy = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Described:
    """``schemas``: the description's own, by name. ``instead``: for ``Schema.property``, or a whole ``Schema``, what a
    schema cannot say."""

    schemas: Mapping[str, Any]
    instead: Mapping[str, Strategy]

    def of(self, name: str) -> Strategy:
        if name in self.instead:
            return self.instead[name]
        return self._object(name, self.schemas[name])

    def field(self, schema: str, name: str) -> Strategy:
        return self._value(self.schemas[schema]["properties"][name])

    def _value(self, schema: Mapping[str, Any]) -> Strategy:
        if "$ref" in schema:
            return self.of(schema["$ref"].rpartition("/")[2])
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        for union in ("oneOf", "anyOf"):
            if union in schema:
                return st.one_of(*map(self._value, schema[union]))
        return self._typed(schema)

    def _typed(self, schema: Mapping[str, Any]) -> Strategy:
        match schema["type"]:
            case "null":
                return st.none()
            case "boolean":
                return st.booleans()
            case "integer":
                return integers(schema)
            case "number":
                return numbers(schema)
            case "string":
                return st.text(min_size=schema.get("minLength", 0), max_size=12)
            case "array":
                most = min(MOST_EXTRA, schema.get("maxItems", MOST_EXTRA))
                return st.lists(self._value(schema["items"]), min_size=schema.get("minItems", 0), max_size=most)
            case "object":  # without fields of its own: by token
                return st.dictionaries(
                    st.integers(0, 300).map(str), self._value(schema["additionalProperties"]), max_size=3
                )
        raise AssertionError(f"a schema of no known type: {schema}")

    def _object(self, name: str, schema: Mapping[str, Any]) -> Strategy:
        fields = {
            field: self.instead.get(f"{name}.{field}", self._value(below))
            for field, below in schema["properties"].items()
        }
        always = {f"{name}.{field}" for field in schema.get("required", ())} | set(self.instead)
        extra = sorted(field for field in fields if f"{name}.{field}" not in always)

        @st.composite
        def made(draw: st.DrawFn) -> dict[str, Any]:
            chosen = draw(st.sets(st.sampled_from(extra), max_size=MOST_EXTRA)) if extra else set()
            return {field: draw(value) for field, value in fields.items() if field in chosen or field not in extra}

        return made()


def integers(schema: Mapping[str, Any]) -> Strategy:
    most = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - 1)
    return st.integers(schema.get("minimum"), None if most == math.inf else most)


def numbers(schema: Mapping[str, Any]) -> Strategy:
    return st.floats(
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum"),
        exclude_min="exclusiveMinimum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )


@st.composite
def one_node_changed(draw: st.DrawFn, valid: Strategy) -> Any:
    """A node is anything at all, or gone; as often far below as near the top."""
    value = draw(valid)
    found = list(paths(value))
    depth = draw(st.sampled_from(sorted({len(path) for path in found}, reverse=True)))
    path = draw(st.sampled_from([path for path in reversed(found) if len(path) == depth]))
    return changed(value, path, draw(JSON | st.just(GONE)))


def paths(value: object, at: Path = ()) -> Iterator[Path]:
    """Of every node but the whole."""
    if at:
        yield at
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in below:
        yield from paths(each, (*at, name))


def changed(value: Any, path: Path, to: object) -> Any:
    name, *rest = path
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[name] = changed(value[name], tuple(rest), to)
    elif to is GONE:
        del copy[name]
    else:
        copy[name] = to
    return copy
