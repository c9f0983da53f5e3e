"""Fixed replies, as a daemon would give them."""

from __future__ import annotations

from epdctl.ids import Incarnation, PhysicalGpu, RankName, RunId
from epdctl.wire.control import RankState, RankStatus, StatusReply
from epdctl.wire.lifecycle import Endpoints


def rank(name: str, state: RankState = RankState.READY, reason: str = "serving", **changed: object) -> RankStatus:
    fields: dict[str, object] = {
        "since": 200.0,
        "pid": 4242,
        "incarnation": Incarnation(1),
        "restarts": 0,
        "gpus": [],
        "rss_bytes": 300 << 20,
        "inflight": 2,
        "completed": 7,
        "endpoints": Endpoints(),
    } | changed
    return RankStatus(rank=RankName(name), stage=RankName(name).stage, state=state, reason=reason, **fields)  # type: ignore[arg-type]


def reply(*ranks: RankStatus, gateway: str | None = "http://127.0.0.1:8000") -> StatusReply:
    return StatusReply(schema=1, cluster="demo", run=RunId("0123456789abcdef"), gateway=gateway, ranks=list(ranks))


READY = reply(
    rank("gateway/0", endpoints=Endpoints(http="http://127.0.0.1:8000")),
    rank("encoder-router/0"),
    rank("encoder/0", gpus=[PhysicalGpu(index=3, uuid="GPU-abc")]),
    rank("prefill/0"),
    rank("decode/0"),
)
STARTING = reply(rank("gateway/0"), rank("encoder/0", RankState.STARTING, "loading weights 3/9"))
BROKEN = reply(
    rank("gateway/0"),
    rank(
        "prefill/0",
        RankState.FAILED,
        "the checkpoint has no key lm_head.weight",
        pid=None,
        rss_bytes=None,
        inflight=None,
        log_tail=["loading", "\x1b[31mKeyError\x1b[0m"],
    ),
)
