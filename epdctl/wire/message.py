"""The base of every message, and the codec that turns a union of messages into bounded, schema-checked bytes."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from epdctl.errors import BadMessage
from epdctl.ids import Secret

__all__ = ["MAX_MESSAGE_BYTES", "PROTOCOL", "Codec", "Message", "Part", "to_json"]

PROTOCOL = 1  # raised with every change that an older process would misread
MAX_MESSAGE_BYTES = 8 << 20  # a control message; bulk bytes travel in frames of their own


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A piece of a message; never sent alone."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag=True, forbid_unknown_fields=True, gc=False):
    """One thing said between two processes."""


def _encode_hook(value: object) -> str:
    if isinstance(value, Secret):
        return value.reveal()
    return _text_of(value)


def _text_of(value: object) -> str:
    if isinstance(value, str):  # RankName and its like: a str subclass travels as its text
        return str(value)
    raise NotImplementedError(f"no wire form for {type(value).__name__}")


def _decode_hook(kind: type[Any], value: object) -> object:
    return kind(value)


T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes one union of messages. Threads may share it.

    Raises BadMessage on anything the union does not allow, including a frame above ``limit`` bytes.
    """

    def __init__(self, union: Any, *, limit: int = MAX_MESSAGE_BYTES) -> None:
        self.limit = limit
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_hook)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union, dec_hook=_decode_hook)

    def encode(self, message: T) -> bytes:
        frame = self._encoder.encode(message)
        if len(frame) > self.limit:
            raise BadMessage(f"{type(message).__name__} is {len(frame)} bytes; the limit is {self.limit}")
        return frame

    def decode(self, frame: bytes | bytearray | memoryview) -> T:
        if len(frame) > self.limit:
            raise BadMessage(f"a frame of {len(frame)} bytes; the limit is {self.limit}")
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValidationError is a DecodeError
            raise BadMessage(f"undecodable frame: {error}") from error


def to_json(value: object) -> bytes:
    """The JSON a person or a script reads: field for field the struct, without the wire's tag. Secrets stay hidden."""
    return msgspec.json.encode(_untagged(value), enc_hook=_text_of)


def _untagged(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        return {name: _untagged(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [_untagged(item) for item in value]
    return value
