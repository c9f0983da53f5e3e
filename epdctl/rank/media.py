"""Media of a request: base64 to bytes, what their headers say, their hash. Decodes nothing of what they hold."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from epdctl.errors import RequestError
from epdctl.families.base import Family, Header, Span
from epdctl.families.frames import pack
from epdctl.families.samples import MEDIA_TYPES
from epdctl.ids import Modality
from epdctl.rank.headers import read_header
from epdctl.wire.config import Limits

__all__ = ["Medium", "Source", "invalid", "measure", "read", "span_of"]

_DATA_URL = re.compile(r"data:(?P<kind>\w+)/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_FRAMES = re.compile(r"data:video/jpeg;base64,", re.IGNORECASE)  # pictures, with commas between them


@dataclass(frozen=True, slots=True)
class Source:
    """One medium as a request has it. ``text``: its URL, or with ``bare`` the base64 alone."""

    modality: Modality
    place: str  # in the request
    text: str
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium, exactly as the client sent it."""

    data: bytes
    content_hash: str  # blake2b-128, hex
    header: Header


def read(source: Source, limits: Limits) -> Medium:
    """Of base64 or a data: URL. Raises RequestError (400) that names the place in the request."""
    return measure(_bytes(source), source, limits)


def measure(data: bytes, source: Source, limits: Limits) -> Medium:
    """A file as it came. Raises RequestError (400) like ``read``."""
    try:
        header = read_header(source.modality, data, limits)
    except ValueError as error:
        raise invalid(source, str(error)) from error
    return Medium(data, hashlib.blake2b(data, digest_size=16).hexdigest(), header)


def span_of(family: Family, source: Source, header: Header, of: int) -> Span:
    """Raises RequestError (400) for what the family's processor refuses."""
    try:
        return family.span(header, of)
    except ValueError as error:
        raise invalid(source, str(error)) from error


def invalid(source: Source, text: str) -> RequestError:
    return RequestError(400, f"{source.place}: {text}", param=source.place, code=f"invalid_{source.modality}")


def _bytes(source: Source) -> bytes:
    start = _start(source)
    if _FRAMES.match(source.text):
        return pack([_decoded(frame, source) for frame in source.text[start:].split(",")])
    return _decoded(memoryview(_ascii(source))[start:], source)


def _ascii(source: Source) -> bytes:
    try:
        return source.text.encode("ascii")
    except UnicodeEncodeError as error:
        raise invalid(source, f"not base64: {error}") from error


def _decoded(text: str | memoryview, source: Source) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:  # not ASCII, or not base64
        raise invalid(source, f"not base64: {error}") from error
    if not data:
        raise invalid(source, f"the {source.modality.noun} is empty")
    return data


def _start(source: Source) -> int:
    """Where its base64 begins."""
    if source.bare:
        return 0
    header = _DATA_URL.match(source.text)
    if header is None or header["kind"].lower() != source.modality:
        example = f"data:{MEDIA_TYPES[source.modality]};base64,…"
        raise invalid(source, f"not a data: URL of a {source.modality.noun}; expected {example}")
    return header.end()
