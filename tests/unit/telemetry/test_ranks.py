"""The cluster's figures as Prometheus reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from epdctl.ids import RankName, Stage
from epdctl.telemetry.ranks import rank_text
from epdctl.wire.lifecycle import Embeddings, Heartbeat, RankFigures


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """By name and labels."""
    families = text_string_to_metric_families(text.decode())
    order = ("stage", "rank", "source")
    return {
        (found.name, *(found.labels[label] for label in order if label in found.labels)): found.value
        for family in families
        for found in family.samples
    }


def test_each_rank_tells_what_it_has_and_nothing_else() -> None:
    tower = Embeddings(made=5, shared=1, cached=2, kept_bytes=64, prepared_bytes=128, unreadable=7)
    found = samples(
        rank_text(
            [
                RankFigures(
                    rank=RankName("encoder/0"),
                    stage=Stage.ENCODER,
                    ready=True,
                    restarts=2,
                    rss_bytes=1000,
                    beat=Heartbeat(inflight=3, waiting=1, completed=8, embeddings=tower),
                ),
                RankFigures(
                    rank=RankName("decode/0"),
                    stage=Stage.DECODE,
                    ready=False,
                    restarts=0,
                    beat=Heartbeat(free_pages=7, total_pages=9, leases=1),
                ),
                RankFigures(rank=RankName("prefill/0"), stage=Stage.PREFILL, ready=False, restarts=5, restarts_asked=1),
            ]
        )
    )
    assert {key[1:]: value for key, value in found.items() if "encoder" in key and "embeddings" in key[0]} == {
        ("encoder", "encoder/0", "made"): 5,
        ("encoder", "encoder/0", "shared"): 1,
        ("encoder", "encoder/0", "cached"): 2,
    }
    of = {rank: {key[0]: value for key, value in found.items() if rank in key} for rank in ("decode/0", "prefill/0")}
    assert found["epdctl_rank_cache_bytes", "encoder", "encoder/0"] == 64
    assert found["epdctl_rank_prepared_bytes", "encoder", "encoder/0"] == 128
    assert found["epdctl_rank_unreadable_total", "encoder", "encoder/0"] == 7
    assert found["epdctl_rank_completed_total", "encoder", "encoder/0"] == 8
    assert ("epdctl_rank_kv_pages", "encoder", "encoder/0") not in found, "it has none"
    assert of["decode/0"] == {
        "epdctl_rank_ready": 0,
        "epdctl_rank_restarts_total": 0,
        "epdctl_rank_restarts_asked_total": 0,
        "epdctl_rank_in_flight": 0,
        "epdctl_rank_waiting": 0,
        "epdctl_rank_completed_total": 0,
        "epdctl_rank_leases": 1,
        "epdctl_rank_kv_pages": 9,
        "epdctl_rank_kv_pages_free": 7,
    }
    assert of["prefill/0"] == {
        "epdctl_rank_ready": 0,
        "epdctl_rank_restarts_total": 5,
        "epdctl_rank_restarts_asked_total": 1,
    }, "it has not said anything yet"
    assert found[("epdctl_supervisor_up",)] == 1


def test_a_supervisor_that_does_not_answer_is_all_that_is_told() -> None:
    assert samples(rank_text(None)) == {("epdctl_supervisor_up",): 0}
