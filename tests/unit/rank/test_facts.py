"""What a rank says of itself before it may exchange data."""

from __future__ import annotations

from pathlib import Path

from epdctl.rank.facts import facts_of, fingerprint
from epdctl.wire.serve import KvLayout
from tests.support.ranks import make_spec

LAYOUT = KvLayout(page_size=16, layers=2, kv_heads=2, head_dim=8, dtype="float32")


def checkpoint(folder: Path, config: str = "{}", weights: int = 10) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(bytes(weights))
    (folder / "README.md").write_text(str(folder))
    return folder


def test_the_fingerprint_is_of_config_and_weights_and_of_nothing_else(tmp_path: Path) -> None:
    one = fingerprint(checkpoint(tmp_path / "one"))
    assert fingerprint(checkpoint(tmp_path / "two")) == one
    assert fingerprint(checkpoint(tmp_path / "three", config="{ }")) != one
    assert fingerprint(checkpoint(tmp_path / "four", weights=11)) != one
    assert fingerprint(tmp_path / "nowhere") is None


def test_pages_are_told_by_those_that_exchange_them(sockets: Path) -> None:
    config = make_spec("prefill/0", sockets).config
    assert facts_of(config, width=64).kv_pages is None
    assert facts_of(config, width=64, layout=LAYOUT).kv_pages == "16 tokens x 2 layers x 2 heads x 8 of float32"
    assert (facts_of(config, width=64).width, facts_of(config, width=64).transport) == (64, "zmq")
