"""Which model a checkpoint directory holds, in a few hex digits: by reading a few MB of it, however large it is.

Training changes whole tensors, so one block of each tells two sets of weights of one shape apart.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

__all__ = ["fingerprint"]

BLOCK_BYTES = 4096
BLOCKS = 1024  # in all; of a model with more tensors every second one, or third, and so on
SETTINGS_BYTES = 32 << 20  # a larger JSON file counts by name and size
HEADER_BYTES = 16 << 20


class _Tensor(msgspec.Struct):
    """What the header says of one, as far as we ask."""

    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Block:
    path: Path
    offset: int


def fingerprint(checkpoint: Path) -> str | None:
    """Of what is set (every JSON file: of the model, of its preprocessing) and of what was learnt. None: not there."""
    if not checkpoint.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=8)
    blocks: list[_Block] = []
    for path in sorted(checkpoint.iterdir()):
        if path.suffix not in (".json", ".safetensors"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        if path.suffix == ".safetensors":
            header = _header(path)
            digest.update(header)
            blocks.extend(_Block(path, offset) for offset in _middles(header))
        elif size <= SETTINGS_BYTES:
            digest.update(path.read_bytes())
    chosen = blocks[:: -(-len(blocks) // BLOCKS) or 1]
    for path, group in itertools.groupby(chosen, key=lambda block: block.path):
        with path.open("rb") as file:
            for block in group:
                digest.update(os.pread(file.fileno(), BLOCK_BYTES, block.offset))
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    """Which tensors there are, and where, in JSON behind its length in eight bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, HEADER_BYTES))


def _middles(header: bytes) -> Iterator[int]:
    """Where the middle of each tensor lies in the file. Of a file that is no checkpoint, its beginning must do."""
    try:
        found = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        tensors = [msgspec.json.decode(raw, type=_Tensor) for name, raw in found.items() if name != "__metadata__"]
    except msgspec.DecodeError:
        return
    for start, end in sorted(tensor.data_offsets for tensor in tensors):
        yield 8 + len(header) + max(start, (start + end - BLOCK_BYTES) // 2)
