"""Each rank holds only its half of the weights, seen in resident memory."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from epdctl.bench.checkpoints import SIZES, make_checkpoint
from tests.support.cluster import LANGUAGE, Cluster


def half_bytes(model: Path) -> tuple[int, int]:
    """(tower, language model) in bytes, as float32."""
    tower = language = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                count = 4
                for size in tensors.get_slice(name).get_shape():
                    count *= size
                if "visual" in name:
                    tower += count
                else:
                    language += count
    return tower, language


def resident(home: Path, model: Path, name: str) -> dict[str, int]:
    cluster = Cluster(home, LANGUAGE.format(model=model, chunk=64), name=name)
    cluster.up()
    try:
        return {rank["rank"]: rank["rss_bytes"] for rank in cluster.status()["ranks"]}
    finally:
        cluster.down()


def test_resident_memory_holds_one_half(tmp_path: Path, checkpoint: Path) -> None:
    model = make_checkpoint(tmp_path / "model", SIZES["halves"])
    tower, language = half_bytes(model)
    assert min(tower, language) >= 300 << 20
    small = resident(tmp_path / "small", checkpoint, "small")
    large = resident(tmp_path / "large", model, "large")
    for rank, own, other in (("encoder/0", tower, language), ("language/0", language, tower)):
        grown = large[rank] - small[rank]
        assert 0.7 * own < grown < own + other / 2, f"{rank} grew by {grown >> 20} MiB; its half is {own >> 20} MiB"
