"""How embeddings reach a reader of its own: the framing of the encoder's deliveries, over ZMQ.

The reader binds a ROUTER socket; the encoder connects a DEALER to it for each delivery and sends one multipart message:
the msgpack of ``Embeddings``, then one frame for each of its ``specs``, in order: the rows, row after row, in the
machine's byte order. The reader answers with one frame, the msgpack of ``Received`` or ``Unwanted``; the encoder's HTTP
answer waits for it. ``epdctl.encoder.client`` is such a reader.
"""

from __future__ import annotations

from epdctl.ids import Modality
from epdctl.wire.message import Codec, Message
from epdctl.wire.transfer import TensorSpec

__all__ = [
    "ENCODER_TO_READER",
    "READER_TO_ENCODER",
    "Embeddings",
    "EncoderToReader",
    "ReaderToEncoder",
    "Received",
    "Unwanted",
]


class Embeddings(Message, frozen=True):
    """One part of a request: the embedding of each of its items."""

    delivery: str  # of these embeddings, and so the same when they are delivered again; the answer carries it
    req_id: str
    part_idx: int
    num_parts: int
    modality: Modality
    grids: list[list[int]]  # of each item
    specs: list[TensorSpec]
    token: str = ""  # what the requester asked the encoder to show


class Received(Message, frozen=True):
    delivery: str


class Unwanted(Message, frozen=True):
    delivery: str
    text: str


EncoderToReader = Embeddings
ReaderToEncoder = Received | Unwanted

ENCODER_TO_READER: Codec[EncoderToReader] = Codec(EncoderToReader)
READER_TO_ENCODER: Codec[ReaderToEncoder] = Codec(ReaderToEncoder)
