"""How large the two halves of a checkpoint are, from the headers of its safetensors files; no tensor is read.

The format: eight bytes, little-endian, that say how long the JSON behind them is; in it each tensor's dtype and shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Weights", "read_weights"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_TOWERS = frozenset({"visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "image_newline"})
_DEEPSTACK = "deepstack_merger_list"  # its mergers each add a row's width to every embedding

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers, whatever the dtype that they will have. ``kv``: of one token; ``row``: of one embedding."""

    tower: int
    language: int
    kv: int
    row: int


def read_weights(directory: Path) -> Weights | None:
    """None where the files do not say: a rank that is to load them will say why."""
    try:
        shapes = {name: shape for file in _files(directory) for name, shape in _header(file)}
        return _weights(shapes)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def _files(directory: Path) -> list[Path]:
    """Those that the index names, or the only one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    named = json.loads(index.read_bytes())["weight_map"].values()
    return [directory / name for name in sorted(set(named))]


def _header(file: Path) -> Iterator[tuple[str, list[int]]]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{file} begins with {size} bytes of header")
        header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"the header of {file} is no JSON object")
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, tensor["shape"]


def _weights(shapes: Shapes) -> Weights:
    """Raises ValueError for a model without attention, or without an embedding of tokens."""
    tower = {name for name in shapes if _TOWERS.intersection(name.split("."))}
    language = shapes.keys() - tower
    kv = [shapes[name][0] for name in language if name.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight"))]
    widths = [shapes[name][1] for name in language if name.endswith("embed_tokens.weight")]
    if not kv or not widths:
        raise ValueError("this is no language model")
    return Weights(
        tower=sum(math.prod(shapes[name]) for name in tower),
        language=sum(math.prod(shapes[name]) for name in language),
        kv=sum(kv),
        row=widths[0] * (1 + _deepstack_mergers(tower)),
    )


def _deepstack_mergers(tower: set[str]) -> int:
    parts = (name.partition(f"{_DEEPSTACK}.")[2].partition(".")[0] for name in tower)
    return len({part for part in parts if part})
