"""What may be asked of the encoder over HTTP, and where it is to go. Pure."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, TypeVar

import msgspec

from epdctl.errors import RequestError
from epdctl.ids import Modality

__all__ = ["Destination", "EncodeBody", "SendBody", "Target", "parse", "target_of"]

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Target = Literal["prefill", "caller", "inline", "mooncake"]

MAX_SHARDS = 64


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    req_id: Name
    part_idx: Annotated[int, msgspec.Meta(ge=0)] = 0
    deliver_to: Target | None = None
    prefill_host: Name = "127.0.0.1"
    embedding_port: Port | Annotated[list[Port], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)] | None = None
    reader_token: Annotated[str, msgspec.Meta(max_length=256)] = ""
    budget_s: Annotated[float, msgspec.Meta(gt=0)] | None = None

    @property
    def ports(self) -> list[int]:
        if self.embedding_port is None:
            return []
        return [self.embedding_port] if isinstance(self.embedding_port, int) else self.embedding_port


class EncodeBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /encode``. Without ``deliver_to`` it answers with the sizes, and ``POST /send`` delivers."""

    mm_items: Annotated[list[str], msgspec.Meta(min_length=1)]  # data: URLs
    modality: Literal["image", "IMAGE", "audio", "AUDIO", "video", "VIDEO"] = "image"
    num_parts: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def kind(self) -> Modality:
        return Modality(self.modality.lower())

    def __post_init__(self) -> None:
        if self.part_idx >= self.num_parts:
            raise ValueError(f"part_idx {self.part_idx} of {self.num_parts} parts")


class SendBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /send``: when ``receive_count`` readers have the embeddings they are forgotten; the same ports again are
    the same reader."""

    receive_count: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)] = 1


class Destination(msgspec.Struct, frozen=True):
    """``ports`` is empty for an answer that carries the embeddings itself."""

    host: str
    ports: list[int]
    token: str

    @property
    def endpoints(self) -> list[str]:
        return [f"tcp://{self.host}:{port}" for port in self.ports]


B = TypeVar("B", EncodeBody, SendBody)


def parse(raw: bytes, kind: type[B]) -> B:
    """Raises RequestError (400) for whatever is not as the schema says."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:  # a ValidationError is one
        raise RequestError(400, f"the body is not as it should be: {error}", code="invalid_body") from error


def target_of(body: _Body, *, anywhere: bool) -> Destination | None:
    """None: to be held for ``/send``. ``anywhere``: also to other machines, since the requester showed a token.

    Raises RequestError (400).
    """
    if body.deliver_to is None:
        if body.ports:
            raise RequestError(400, "embedding_port without deliver_to: write prefill or caller", param="deliver_to")
        return None
    if body.deliver_to == "mooncake":
        text = "Mooncake writes only between ranks of one cluster; deliver_to: prefill, caller or inline"
        raise RequestError(400, text, param="deliver_to")
    if body.deliver_to == "inline":
        if body.ports:
            raise RequestError(400, "inline is the answer itself: it takes no embedding_port", param="embedding_port")
        return Destination(body.prefill_host, [], "")
    if not body.ports:
        raise RequestError(400, f"deliver_to {body.deliver_to} needs an embedding_port", param="embedding_port")
    if body.deliver_to == "caller" and len(body.ports) != 1:
        raise RequestError(400, "a caller has one embedding_port; prefill may have several", param="embedding_port")
    return Destination(_host(body.prefill_host, anywhere=anywhere), body.ports, body.reader_token)


def _host(host: str, *, anywhere: bool) -> str:
    try:
        address = ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise RequestError(400, f"prefill_host {host!r} is not an IPv4 address", param="prefill_host") from None
    if not anywhere and not address.is_loopback:
        raise RequestError(
            400, f"prefill_host {host} is another machine, and this encoder asks for no token", param="prefill_host"
        )
    return str(address)
