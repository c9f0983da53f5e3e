"""What a rank with a model says of itself at Ready, so that no two that differ ever exchange data."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

from epdctl.wire.config import RankConfig
from epdctl.wire.lifecycle import Facts
from epdctl.wire.message import PROTOCOL
from epdctl.wire.serve import KvLayout

__all__ = ["facts_of", "fingerprint"]


def facts_of(config: RankConfig, *, width: int, layout: KvLayout | None = None) -> Facts:
    """``width``: values of one embedding row. ``layout``: of a rank that exchanges KV pages."""
    model, transfer = config.model, config.transfer
    return Facts(
        protocol=PROTOCOL,
        transformers=importlib.metadata.version("transformers"),
        checkpoint=fingerprint(Path(model.path)),
        revision=model.revision,
        image_processor=model.image_processor,
        dtype=model.dtype,
        width=width,
        kv_pages=None if layout is None else _in_words(layout),
        transport=f"{transfer.backend} {transfer.protocol}".strip(),
    )


def fingerprint(checkpoint: Path) -> str | None:
    """Of config.json whole, and of the weights' names and sizes: two exports of one model differ in one of them."""
    if not checkpoint.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(checkpoint.iterdir()):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _in_words(layout: KvLayout) -> str:
    return (
        f"{layout.page_size} tokens x {layout.layers} layers x {layout.kv_heads} heads x {layout.head_dim} "
        f"of {layout.dtype}"
    )
