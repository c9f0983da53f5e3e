"""What a rank with a model says of itself at Ready, so that no two that differ ever exchange data."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from epdctl.rank.fingerprint import fingerprint
from epdctl.wire.config import RankConfig
from epdctl.wire.lifecycle import Facts
from epdctl.wire.message import PROTOCOL
from epdctl.wire.serve import KvLayout

__all__ = ["facts_of"]


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


def _in_words(layout: KvLayout) -> str:
    return (
        f"{layout.page_size} tokens x {layout.layers} layers x {layout.kv_heads} heads x {layout.head_dim} "
        f"of {layout.dtype}"
    )
