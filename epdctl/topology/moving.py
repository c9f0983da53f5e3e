"""How bytes will move between the ranks of a plan: what the topology says, or what both ends can do. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from epdctl.ids import READERS, RankName
from epdctl.topology.hardware import Gpu, Hardware
from epdctl.topology.schema import TransferSection
from epdctl.topology.seating import Complaint
from epdctl.wire.config import TransferConfig

__all__ = ["WITHOUT_CUDA", "Ends", "Moving", "moving"]

WITHOUT_CUDA = "mooncake-transfer-engine-non-cuda"


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the model ranks are, all on this host. ``gpus``: of those that have one."""

    ranks: int
    gpus: Mapping[RankName, Gpu]
    mono: bool = False  # every rank keeps what it makes

    @property
    def all_on_cpu(self) -> bool:
        return not self.gpus

    @property
    def all_on_gpu(self) -> bool:
        return len(self.gpus) == self.ranks

    @property
    def sliced(self) -> bool:
        return any(gpu.mig_parent for gpu in self.gpus.values())

    def apart(self, hardware: Hardware) -> tuple[Gpu, Gpu] | None:
        """A writer's GPU and its reader's that cannot reach each other's memory."""
        pairs = (
            (own, other)
            for (writer, own), (reader, other) in itertools.permutations(self.gpus.items(), 2)
            if reader.stage in READERS.get(writer.stage, ())
        )
        return next((pair for pair in pairs if frozenset(gpu.uuid for gpu in pair) in hardware.apart), None)


@dataclass(frozen=True, slots=True)
class Moving:
    """``note``: what was chosen on the user's behalf, and why."""

    config: TransferConfig
    note: str | None
    complaints: tuple[Complaint, ...]


def moving(said: TransferSection, ends: Ends, hardware: Hardware) -> Moving:
    backend, why = (said.backend, None) if said.backend != "auto" else _best(ends, hardware)
    protocol = (said.protocol or ("tcp" if ends.all_on_cpu else "nvlink")) if backend == "mooncake" else ""
    note = None
    if why is not None:
        note = f"transfer: backend: auto → {f'{backend}, protocol {protocol}' if protocol else backend} ({why})"
    elif protocol and said.protocol is None:
        note = f"transfer: protocol → {protocol}"
    config = TransferConfig(
        backend=backend, protocol=protocol, checksum=said.checksum, embedding_bytes=said.embedding_pool
    )
    return Moving(config, note, tuple(_complaints(said, config, ends, hardware)))


def _best(ends: Ends, hardware: Hardware) -> tuple[str, str]:
    """The backend, and why."""
    if ends.mono:
        return "memory", "a mono rank keeps its embeddings in its own memory"
    if ends.all_on_cpu:
        return "shm", "every model rank is on this host's CPU"
    if not ends.all_on_gpu:
        return "zmq", "some model ranks are on GPUs and some are not"
    if ends.sliced:
        return "zmq", "MIG slices cannot write to each other"
    if not hardware.cuda_bindings:
        return "zmq", "cuda.bindings is not installed: `epdctl doctor`"
    if pair := ends.apart(hardware):
        return "zmq", f"GPUs {pair[0]} and {pair[1]} cannot reach each other's memory"
    return "cuda-ipc", "every model rank has a GPU of this host"


def _complaints(said: TransferSection, config: TransferConfig, ends: Ends, hardware: Hardware) -> Iterator[Complaint]:
    backend, protocol = ("transfer", "backend"), ("transfer", "protocol")
    if said.protocol is not None and config.backend != "mooncake":
        yield Complaint(
            protocol, f"{said.protocol} is a protocol of Mooncake's", "write backend: mooncake, or remove it"
        )
    if config.backend == "cuda-ipc":
        yield from _between_gpus(ends, hardware)
    if config.backend == "shm" and not ends.all_on_cpu:
        yield Complaint(backend, "shm moves host memory, but some model ranks are on GPUs", "write auto")
    if config.backend == "mooncake" and hardware.mooncake is None:
        yield Complaint(backend, "no Mooncake package is installed", "`epdctl doctor` prints the line that installs it")
    if config.protocol == "nvlink" and (not ends.all_on_gpu or ends.sliced):
        yield Complaint(
            protocol if said.protocol else backend,
            "nvlink is between whole GPUs, and some model ranks have none",
            "write protocol: tcp, or give every stage gpus",
        )
    elif config.protocol == "nvlink" and hardware.mooncake == WITHOUT_CUDA:
        yield Complaint(
            backend, f"{WITHOUT_CUDA} knows no GPUs", "`epdctl doctor` prints the line that installs another"
        )


def _between_gpus(ends: Ends, hardware: Hardware) -> Iterator[Complaint]:
    where = ("transfer", "backend")
    if not ends.all_on_gpu or ends.sliced:
        problem = "cuda-ipc is between whole GPUs (no MIG slices), and some model ranks have none"
        yield Complaint(where, problem, "write auto, or give every stage gpus")
    elif not hardware.cuda_bindings:
        yield Complaint(where, "cuda-ipc needs cuda.bindings, which is not installed", "pip install cuda-bindings")
    elif pair := ends.apart(hardware):
        yield Complaint(where, f"GPUs {pair[0]} and {pair[1]} cannot reach each other's memory", "write auto")
