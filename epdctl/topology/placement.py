"""A topology on a machine: which ranks there are, where each runs, with how many threads. Pure and deterministic.

What a rank's command and environment are is the adapter's business.
"""

from __future__ import annotations

from collections.abc import Mapping

from epdctl.errors import PlacementError
from epdctl.ids import TOWER_STAGES, Stage
from epdctl.topology.checkpoint import Checkpoint
from epdctl.topology.configs import ranks_of
from epdctl.topology.document import Trail
from epdctl.topology.hardware import Hardware
from epdctl.topology.patience import patient
from epdctl.topology.plan import Plan, PlannedRank, RestartMode, RestartPolicy
from epdctl.topology.schema import StageSection, Topology, TopologyFile
from epdctl.topology.seating import Complaint, seat, wishes_of
from epdctl.topology.settled import Settled, settle
from epdctl.wire.config import ModelConfig

__all__ = ["listeners", "place"]

_SEATED_BY = ("gpus", "share", "replicas", "dp")


def place(
    topology: Topology, checkpoint: Checkpoint, hardware: Hardware, ports_in_use: Mapping[int, str] | None = None
) -> Plan:
    """``ports_in_use``: port of the topology → what is with it. Raises PlacementError with all that fails, less what
    rests on a field that is in doubt."""
    on_cpu = {stage for stage, section in topology.file.stages.present() if _runs_on_cpu(section, hardware)}
    wishes = [
        wish
        for stage, section in topology.file.stages.present()
        if stage not in on_cpu
        for wish in wishes_of(stage, section)
    ]
    seating = seat(wishes, hardware.gpus)
    settled = settle(topology, checkpoint, hardware, seating)
    complaints = [
        *seating.complaints,
        *settled.moving.complaints,
        *settled.pools.complaints,
        *_port_complaints(topology, ports_in_use or {}),
        *_attention_complaints(settled.model, on_cpu),
    ]
    if certain := [one for one in complaints if not topology.doubts(*_grounds(topology, one))]:
        raise PlacementError.of([topology.document.mistake(one.trail, one.problem, one.remedy) for one in certain])
    ranks = ranks_of(topology, settled, seating)
    deadlines, waits = patient(topology.file.deadlines, ranks, checkpoint.weights)
    return Plan(
        cluster=topology.cluster,
        source=topology.source,
        adapter=topology.file.adapter,
        ranks=ranks,
        restart=_restart(topology),
        deadlines=deadlines,
        notes=(*hardware.notes, *_notes(topology, settled, hardware, on_cpu), *waits, *_thread_notes(ranks, hardware)),
    )


def _runs_on_cpu(section: StageSection, hardware: Hardware) -> bool:
    """Said with ``gpus: none``; assumed where nothing was said and there is no GPU."""
    return section.gpus == "none" or (section.gpus is None and section.share is None and not hardware.gpus)


def listeners(file: TopologyFile) -> list[tuple[Trail, str, int]]:
    """Every TCP port of the topology: where it stands in the file, its address, the port."""
    http = file.stages.encoder.http if file.stages.encoder else None
    ports: list[tuple[Trail, str, int]] = []
    if file.stages.fronted:
        ports.append((("gateway", "port"), file.gateway.host, file.gateway.port))
    if http is not None:
        ports.append((("stages", "encoder", "http", "port"), http.host, http.port))
    return ports


def _port_complaints(topology: Topology, ports_in_use: Mapping[int, str]) -> list[Complaint]:
    return [
        Complaint(
            trail,
            f"port {port} of {host} is {ports_in_use[port]}",
            "stop that, or choose another: in the file, or by the variable that it reads, such as EPDCTL_PORT",
        )
        for trail, host, port in listeners(topology.file)
        if port in ports_in_use
    ]


def _attention_complaints(model: ModelConfig, on_cpu: set[Stage]) -> list[Complaint]:
    towers = {Stage.ENCODER: "the encoder", Stage.MONO: "mono"}
    where = next((f"{name} runs on the CPU" for stage, name in towers.items() if stage in on_cpu), None)
    if model.dtype == "float32":
        where = where or "dtype is float32"
    if model.attention != "varlen" or where is None:
        return []
    return [Complaint(("model", "attention"), f"varlen needs a GPU and 16-bit numbers, but {where}", "write auto")]


def _grounds(topology: Topology, complaint: Complaint) -> list[Trail]:
    """The fields that ``complaint`` follows from: who gets which GPU follows from the wishes of all stages."""
    if complaint.trail[0] != "stages":
        return [complaint.trail]
    stages = [stage for stage, _ in topology.file.stages.present()]
    return [complaint.trail, *(("stages", stage, field) for stage in stages for field in _SEATED_BY)]


def _restart(topology: Topology) -> RestartPolicy:
    values = topology.file.restart.model_dump()
    return RestartPolicy(**values | {"mode": RestartMode(values["mode"])})


def _notes(topology: Topology, settled: Settled, hardware: Hardware, on_cpu: set[Stage]) -> list[str]:
    """Every choice made on the user's behalf, and what is missed without a stage that nobody wrote."""
    file = topology.file
    unsaid = [(stage, section) for stage, section in file.stages.present() if section.gpus is None]
    chosen = [
        ("model: dtype", file.model.dtype, settled.model.dtype),
        ("model: image_processor", file.model.image_processor, settled.model.image_processor),
    ]
    notes = [f"{what}: auto → {choice}" for what, said, choice in chosen if said == "auto"]
    if settled.moving.note is not None:
        notes.append(settled.moving.note)
    notes += settled.pools.notes
    for where, stages in (
        ("none (this machine shows no GPU)", [stage for stage, _ in unsaid if stage in on_cpu]),
        (f"auto ({len(hardware.gpus)} visible)", [stage for stage, _ in unsaid if stage not in on_cpu]),
    ):
        if stages:
            notes.append(f"{', '.join(stages)}: gpus → {where}")
    if settled.limits.max_context != file.limits.max_context:
        kept = settled.limits.max_context
        notes.append(f"limits: max_context: {file.limits.max_context} → {kept}, what the smallest KV pool holds")
    if TOWER_STAGES.isdisjoint(stage for stage, _ in file.stages.present()):
        notes.append("no encoder stage: pictures, sound and video are refused")
    return notes


def _thread_notes(ranks: tuple[PlannedRank, ...], hardware: Hardware) -> list[str]:
    """More compute threads than cores make every step many times slower, so it is said."""
    busy = sum(rank.config.threads for rank in ranks if rank.config.stage not in (Stage.GATEWAY, Stage.ENCODER_ROUTER))
    if busy <= hardware.cores or all(rank.config.threads == 1 for rank in ranks):
        return []
    return [f"threads: {busy} compute threads on {hardware.cores} cores; steps will wait for each other"]
