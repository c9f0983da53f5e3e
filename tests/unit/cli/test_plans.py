"""A plan as text."""

from __future__ import annotations

import dataclasses

import msgspec

from epdctl.cli.plans import plan_lines, rank_lines
from epdctl.ids import PhysicalGpu, RankName, Stage
from epdctl.topology.plan import Deadlines, Plan, PlannedRank, RestartPolicy
from epdctl.wire.config import EngineConfig, GatewayConfig, ModelConfig, RankConfig

MODEL = ModelConfig(path="/m", name="m", family="f")


def planned(stage: Stage, env: dict[str, str], *gpus: PhysicalGpu, share: float = 1.0) -> PlannedRank:
    config = RankConfig(
        rank=RankName.of(stage, 0), stage=stage, service="a.b:C", model=MODEL, threads=3, share=share,
        gateway=GatewayConfig(port=81),
    )  # fmt: skip
    return PlannedRank(config=config, gpus=gpus, argv=("python", "-m", "a rank"), env=env)


def test_a_rank_with_a_cache_shows_its_size_and_a_bounded_one_its_bound() -> None:
    rank = planned(Stage.DECODE, {}, PhysicalGpu(3, "GPU-x"), share=0.5)
    config = msgspec.structs.replace(rank.config, memory_bytes=69 << 30, engine=EngineConfig(kv_tokens=4096))
    lines = list(rank_lines(dataclasses.replace(rank, config=config), {}))
    assert "  gpus     3 (GPU-x), share 0.5: 69.0 GiB" in lines
    assert "  kv       4096 tokens, pages of 16" in lines


def test_a_plan_shows_each_rank_and_says_once_what_all_share() -> None:
    plan = Plan(
        cluster="c", source="c.yaml", adapter="native", restart=RestartPolicy(), deadlines=Deadlines(),
        ranks=(
            planned(Stage.GATEWAY, {"LANG": "C", "A": "1"}),
            planned(Stage.ENCODER, {"LANG": "C", "A": "two words"}, PhysicalGpu(3, "GPU-x"), share=0.5),
        ),
    )  # fmt: skip
    assert "\n".join(plan_lines(plan)).splitlines() == [
        "cluster   c",
        "source    c.yaml",
        "adapter   native",
        "gateway   http://127.0.0.1:81",
        "restart   always, at most 5 in 600 s",
        "deadlines start 600 s, heartbeat 1 s, unhealthy 5 s, dead 30 s, stuck 120 s, drain 30 s, kill 5 s",
        "every rank",
        "  env      LANG=C",
        "",
        "gateway/0",
        "  gpus     none (CPU)",
        "  threads  3",
        "  ports    127.0.0.1:81",
        "  model    /m (float32), service a.b:C",
        "  command  python -m 'a rank'",
        "  env      A=1",
        "",
        "encoder/0",
        "  gpus     3 (GPU-x), share 0.5",
        "  threads  3",
        "  ports    none (unix sockets)",
        "  model    /m (float32), service a.b:C",
        "  command  python -m 'a rank'",
        "  env      A='two words'",
    ]
