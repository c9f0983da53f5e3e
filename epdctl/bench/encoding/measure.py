"""The whole measurement of an encoder: its tower alone, then ranks under a real daemon, fed with pictures."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from epdctl.bench.clusters import Say, await_ready, environment, running
from epdctl.bench.encoding.forwards import Comparison, Packed, compare, packed
from epdctl.bench.encoding.orders import FOLDER, Orders, Outcome, Phase, Row, outcomes_of
from epdctl.bench.encoding.towers import SIZES, TRUE_SIZE, qwen2_5_vl_config
from epdctl.control.client import Client
from epdctl.errors import DeadlineExceeded, RankFailed, UserError
from epdctl.ids import LocalGpu, RankName, Stage
from epdctl.topology.plan import Deadlines, Plan, PlannedRank, RestartMode, RestartPolicy
from epdctl.wire.config import EncoderConfig, Limits, ModelConfig, RankConfig
from epdctl.wire.control import RankState

if TYPE_CHECKING:
    import torch

__all__ = ["Flow", "Job", "Report", "measure", "tower_size"]

WORKERS = 8  # preprocessing threads of an encoder rank
LONGEST = 120.0  # seconds that ranks may take beyond their phases


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure. ``encoders``: ranks, each with a GPU of its own, or on the CPU where ``gpu`` is not set.

    ``towers``: whether the tower is measured alone as well.
    """

    size: str = "7b"
    gpu: bool = True
    encoders: int = 1
    seconds: float = 30.0
    towers: bool = True


class Flow(msgspec.Struct, frozen=True):
    """Pictures that came through ranks, all clients together."""

    name: str
    pictures: int
    seconds: float
    per_second: float
    p50_ms: float
    p99_ms: float
    checked: int


class Report(msgspec.Struct, frozen=True):
    """``packed_ratio``: the pictures of 448² per second through one rank, over those of one packed forward of 64;
    ``undecoded_ratio``: the same with preprocessing taken out."""

    schema: int
    command: str
    device: str
    cpus: int
    versions: dict[str, str]
    encoders: int
    workers: int
    towers: list[Comparison]
    packed: list[Packed]
    flows: list[Flow]
    packed_ratio: float | None
    undecoded_ratio: float | None


def tower_size(wanted: str | None, *, gpu: bool) -> str:
    """The true one is for GPUs: on a CPU it takes for ever, so there it must be asked for. Raises UserError."""
    if wanted is None:
        return TRUE_SIZE if gpu else "tiny"
    if wanted not in SIZES:
        raise UserError(f"--size {wanted}: there is no such size", hint=f"one of {', '.join(SIZES)}")
    return wanted


def measure(job: Job, say: Say) -> Report:
    """Raises UserError without a GPU that the job wants, RankFailed, and DeadlineExceeded when ranks do not come to an
    end."""
    import torch

    device = _device(job)
    small, middle, large = _sides(job)
    towers: list[Comparison] = []
    forwards: list[Packed] = []
    if job.towers:
        towers.append(compare("Qwen2.5-VL", job.size, device, large, say))
        towers.append(compare("Qwen3-VL", job.size, device, (large[0], 1024 if job.size == "7b" else 128), say))
        forwards = packed(job.size, device, [small, middle], say)
    flows = _flows(job, _phases(job), say)
    return Report(
        schema=1,
        command="epdctl " + " ".join(sys.argv[1:]),
        device=torch.cuda.get_device_name(device) if job.gpu else platform.processor() or platform.machine(),
        cpus=os.cpu_count() or 1,
        versions=_versions(),
        encoders=job.encoders,
        workers=WORKERS,
        towers=towers,
        packed=forwards,
        flows=flows,
        packed_ratio=_ratio(flows, "clients", forwards, job),
        undecoded_ratio=_ratio(flows, "undecoded", forwards, job),
    )


def _device(job: Job) -> torch.device:
    import torch

    if not job.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("no GPU here that torch can use", hint="`--cpu` shows without one that it works, not how fast")
    return torch.device("cuda", 0)


def _sides(job: Job) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(how many, pixels): small and middle for packed forwards and flows, large for the tower alone."""
    if job.size == "7b":
        return (64, 448), (64, 560), (8, 1008)
    return (4, 56), (4, 84), (2, 112)


def _phases(job: Job) -> list[Phase]:
    """64 clients with two pictures each in flight; then as many of the middle size as keep a rank busy."""
    small, middle, _ = _sides(job)
    seconds, warm = job.seconds, min(4.0, job.seconds / 4)
    inflight = 2 * small[0]
    return [
        Phase(name="clients", side=small[1], inflight=inflight, seconds=seconds, warm=warm),
        Phase(name="undecoded", side=small[1], inflight=inflight, seconds=seconds / 3, warm=warm, decoded=True),
        Phase(name="stream", side=middle[1], inflight=inflight, seconds=seconds / 2, warm=warm),
    ]


def _ratio(flows: list[Flow], name: str, forwards: list[Packed], job: Job) -> float | None:
    if not forwards:
        return None
    rate = next(flow.per_second for flow in flows if flow.name == name)
    return round(rate / job.encoders / forwards[0].rate, 3)


def _flows(job: Job, phases: list[Phase], say: Say) -> list[Flow]:
    with tempfile.TemporaryDirectory(prefix="epdctl-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write_model(folder)
        _orders(job, phases).write(folder)
        environ = environment(folder) | {FOLDER: str(folder)}
        plan = _plan(job, folder, environ)
        say(f"{job.encoders} encoder ranks are loading")
        with running(plan, environ) as daemon:
            await_ready(daemon.cluster.client)
            clients = [rank.rank for rank in plan.ranks if rank.stage is Stage.LANGUAGE]
            longest = LONGEST + sum(phase.warm + phase.seconds for phase in phases)
            seen = _await_outcomes(daemon.cluster.client, folder, clients, longest)
    flows = [_together(list(outcomes)) for outcomes in zip(*seen, strict=True)]
    for flow in flows:
        say(f"{flow.name}: {flow.per_second:.0f} pictures/s, p50 {flow.p50_ms:.0f} ms")
    return flows


def _orders(job: Job, phases: list[Phase]) -> Orders:
    width = int(qwen2_5_vl_config(job.size).out_hidden_size)
    row = Row(width=width, dtype="bfloat16", itemsize=2) if job.gpu else Row(width=width, dtype="float32", itemsize=4)
    return Orders(size=job.size, encoders=job.encoders, row=row, phases=phases)


def _write_model(folder: Path) -> None:
    """What a family reads of a checkpoint before its weights."""
    config = {"model_type": "qwen2_5_vl", "image_token_id": 3, "eos_token_id": 0}
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _plan(job: Job, folder: Path, environ: dict[str, str]) -> Plan:
    """A router, the encoders, and for each encoder a rank that feeds them."""
    ranks = [_rank(RankName.of(Stage.ENCODER_ROUTER, 0), "epdctl.encoder.router:RouterService", job, folder, environ)]
    for number in range(job.encoders):
        service = "epdctl.bench.encoding.rank:MeasuredEncoder"
        own = environ | {"CUDA_VISIBLE_DEVICES": str(number) if job.gpu else ""}
        ranks.append(_rank(RankName.of(Stage.ENCODER, number), service, job, folder, own))
    for number in range(job.encoders):
        own = environ | {"CUDA_VISIBLE_DEVICES": ""}
        name = RankName.of(Stage.LANGUAGE, number)
        ranks.append(_rank(name, "epdctl.bench.encoding.load:Load", job, folder, own))
    return Plan(
        cluster="bench",
        source="(bench encode)",
        adapter="bench",
        ranks=tuple(ranks),
        restart=RestartPolicy(mode=RestartMode.NEVER),
        deadlines=Deadlines(),
    )


def _rank(name: RankName, service: str, job: Job, folder: Path, environ: dict[str, str]) -> PlannedRank:
    inflight = max(phase.inflight for phase in _phases(job))
    config = RankConfig(
        rank=name,
        stage=name.stage,
        service=service,
        model=ModelConfig(
            path=str(folder), name="random", family="qwen2_5_vl", dtype="bfloat16" if job.gpu else "float32"
        ),
        devices=[LocalGpu(0)] if job.gpu and name.stage is Stage.ENCODER else [],
        limits=Limits(inflight=inflight),
        encoder=EncoderConfig(preprocess_threads=WORKERS if job.gpu else 2, batch_patches=65_536),
    )
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return PlannedRank(config=config, argv=(sys.executable, "-m", "epdctl.rank"), env=environ | threads)


def _await_outcomes(client: Client, folder: Path, ranks: list[RankName], seconds: float) -> list[list[Outcome]]:
    deadline = time.monotonic() + seconds
    for reply in client.watch():
        for status in reply.ranks:
            if status.state is not RankState.READY:
                raise RankFailed(status.rank, f"{status.state}: {status.reason}", status.log_tail)
        found = [outcome for rank in ranks if (outcome := outcomes_of(folder, rank)) is not None]
        if len(found) == len(ranks):
            return found
        if time.monotonic() > deadline:
            break
    raise DeadlineExceeded(f"the clients did not come to an end within {seconds:.0f} s")


def _together(outcomes: list[Outcome]) -> Flow:
    pictures = sum(outcome.pictures for outcome in outcomes)
    return Flow(
        name=outcomes[0].name,
        pictures=pictures,
        seconds=outcomes[0].seconds,
        per_second=round(pictures / outcomes[0].seconds, 1),
        p50_ms=max(outcome.p50_ms for outcome in outcomes),
        p99_ms=max(outcome.p99_ms for outcome in outcomes),
        checked=sum(outcome.checked for outcome in outcomes),
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "pillow", "pyzmq"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
