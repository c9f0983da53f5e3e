"""The values a topology may hold beyond numbers and words: sizes, durations, GPU names. Each mistake has a remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from epdctl.ids import Secret

__all__ = ["ApiKey", "Bytes", "CacheBytes", "GpuName", "Gpus", "Seconds", "parse_duration", "parse_size"]

GpuName = int | str  # an index as nvidia-smi counts, or (the beginning of) a UUID

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kmgt]i?)?b$", re.IGNORECASE)
SHORTEST_KEY = 16
_KEY = re.compile(r"^[!-~]{16,256}$")
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(ms|s|m|h)$")
_PREFIXES = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_UUID = re.compile(r"^(GPU|MIG)-[0-9a-fA-F][0-9a-fA-F/-]*$|^MIG-GPU-[0-9a-fA-F/-]+$")


def wrong(problem: str, remedy: str) -> PydanticCustomError:
    """A validation error that carries its remedy; ``{value}`` in the text is what the file says."""
    return PydanticCustomError("epdctl", "{problem}", {"problem": problem, "remedy": remedy})


def parse_size(value: object) -> int:
    """Bytes, from a count or a text like ``64MiB`` (binary) or ``64MB`` (decimal)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise wrong("should be a size", "write bytes as an integer, or a size like 64MiB, 2GiB or 500MB")
    prefix = (match[2] or "").lower()
    return int(float(match[1]) * (_PREFIXES | _BINARY)[prefix])


def parse_cache(value: object) -> int:
    """Bytes, or 0 for ``off``, which YAML may have read as a boolean."""
    return 0 if value == "off" or value is False else parse_size(value)


def parse_duration(value: object) -> float:
    """Seconds, from a number or a text like ``500ms``, ``5s``, ``2m``, ``1h``."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise wrong("should be a duration", "write seconds as a number, or a duration like 500ms, 5s, 2m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def parse_key(value: object) -> Secret:
    """What clients show; never found by trying."""
    if isinstance(value, str) and _KEY.match(value):
        return Secret(value)
    raise wrong(
        f"should be {SHORTEST_KEY} to 256 visible ASCII characters in quotes",
        "write ${EPDCTL_API_KEY} and set that, for example to the output of `openssl rand -hex 16`",
    )


def _word(value: object) -> str:
    if value in ("auto", "none"):
        return str(value)
    if isinstance(value, str) and _UUID.match(value):
        raise wrong("should be auto, none or a list", f"write [{value}]")
    if isinstance(value, int) and not isinstance(value, bool):
        raise wrong("should be auto, none or a list", f"write [{value}]")
    raise wrong("should be auto, none or a list of GPUs", "write auto, none, or a list like [0, 1] or [GPU-5f0c1a2b]")


def _gpu(value: object) -> GpuName:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and _UUID.match(value):
        return value
    raise wrong("should name a GPU", "write its index as nvidia-smi shows it, or its UUID: GPU-… or MIG-…")


def _shape(value: object) -> str:
    return "list" if isinstance(value, list) else "word"


def _text_or(kind: str, pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind, "minimum": 0}, {"type": "string", "pattern": pattern}]})


def _after(parse: Callable[[object], Any]) -> BeforeValidator:
    return BeforeValidator(parse)


Bytes = Annotated[int, _after(parse_size), Field(ge=1), _text_or("integer", r"^\d+(\.\d+)?\s*([kKmMgGtT]i?)?[bB]$")]
CacheBytes = Annotated[
    int, _after(parse_cache), Field(ge=0), _text_or("integer", r"^off$|^\d+(\.\d+)?\s*([kKmMgGtT]i?)?[bB]$")
]
ApiKey = Annotated[
    Secret, PlainValidator(parse_key), WithJsonSchema({"type": "string", "minLength": SHORTEST_KEY, "maxLength": 256})
]
Seconds = Annotated[float, _after(parse_duration), Field(gt=0), _text_or("number", r"^\d+(\.\d+)?\s*(ms|s|m|h)$")]

_Word = Annotated[str, PlainValidator(_word), WithJsonSchema({"enum": ["auto", "none"]}), Tag("word")]
_Gpu = Annotated[
    GpuName,
    PlainValidator(_gpu),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^(GPU|MIG)-"}]}),
]
_List = Annotated[tuple[_Gpu, ...], Field(strict=False, min_length=1), Tag("list")]
Gpus = Annotated[_Word | _List, Discriminator(_shape)]
