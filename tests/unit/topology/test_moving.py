"""Which transport a plan settles on, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from epdctl.errors import PlacementError
from epdctl.topology.hardware import Hardware
from tests.unit.topology.support import gpu, machine, plan, rank

MODEL = "model: {path: x}\n"
EPD = MODEL + "stages: {encoder: {}, prefill: {}, decode: {}}\n"
CUDA, CPU = "mooncake-transfer-engine-cuda13", "mooncake-transfer-engine-non-cuda"


def beside(gpus: int, mooncake: str | None) -> Hardware:
    return dataclasses.replace(machine(gpus), mooncake=mooncake)


def apart(gpus: int, one: int, other: int) -> Hardware:
    found = machine(gpus)
    return dataclasses.replace(found, apart=frozenset({frozenset({found.gpus[one].uuid, found.gpus[other].uuid})}))


def without_bindings(gpus: int) -> Hardware:
    return dataclasses.replace(machine(gpus), cuda_bindings=False)


@pytest.mark.parametrize(
    ("text", "hardware", "backend", "protocol", "why"),
    [
        (EPD, beside(0, None), "shm", "", "auto → shm (every model rank is on this host's CPU)"),
        (EPD, beside(0, CPU), "shm", "", "auto → shm"),
        (EPD, beside(3, CUDA), "cuda-ipc", "", "auto → cuda-ipc (every model rank has a GPU of this host)"),
        (EPD, beside(3, None), "cuda-ipc", "", "auto → cuda-ipc"),
        (EPD, apart(3, 1, 2), "zmq", "", "auto → zmq (GPUs 1 and 2 cannot reach each other's memory)"),
        (EPD, apart(3, 0, 2), "cuda-ipc", "", "auto → cuda-ipc"),  # an encoder writes nothing to decode
        (EPD, without_bindings(3), "zmq", "", "auto → zmq (cuda.bindings is not installed: `epdctl doctor`)"),
        (EPD + "transfer: {backend: mooncake}", beside(0, CPU), "mooncake", "tcp", "transfer: protocol → tcp"),
        (EPD + "transfer: {backend: mooncake}", beside(3, CUDA), "mooncake", "nvlink", "transfer: protocol → nvlink"),
        (MODEL + "stages: {mono: {}}", beside(0, CPU), "memory", "", "backend: auto → memory (a mono rank"),
    ],
)
def test_what_is_not_said_is_chosen_and_noted(
    text: str, hardware: Hardware, backend: str, protocol: str, why: str
) -> None:
    made = plan(text, hardware)
    for planned in made.ranks:
        assert (planned.config.transfer.backend, planned.config.transfer.protocol) == (backend, protocol)
    assert [why in note for note in made.notes if note.startswith("transfer")] == [True]


def test_what_is_said_is_done_and_needs_no_note() -> None:
    text = EPD + "transfer: {backend: mooncake, protocol: rdma, checksum: true}"
    made = plan(text, beside(3, CUDA))
    transfer = rank(made, "decode/0").config.transfer
    assert (transfer.backend, transfer.protocol, transfer.checksum) == ("mooncake", "rdma", True)
    assert not [note for note in made.notes if note.startswith("transfer")]


def test_half_on_gpus_and_slices_meet_over_zmq() -> None:
    half = plan(MODEL + "stages: {encoder: {gpus: none}, language: {gpus: [0]}}", beside(1, CUDA))
    assert rank(half, "encoder/0").config.transfer.backend == "zmq"
    slices = Hardware((gpu(0, "MIG-1", "GPU-9"), gpu(0, "MIG-2", "GPU-9")), 16, mooncake=CUDA)
    sliced = plan(MODEL + "stages: {encoder: {}, language: {}}", slices)
    assert rank(sliced, "encoder/0").config.transfer.backend == "zmq"


@pytest.mark.parametrize(
    ("transfer", "hardware", "problem"),
    [
        ("{backend: shm}", beside(3, CUDA), "transfer.backend: shm moves host memory"),
        ("{backend: cuda-ipc}", beside(0, None), "transfer.backend: cuda-ipc is between whole GPUs"),
        ("{backend: cuda-ipc}", without_bindings(3), "transfer.backend: cuda-ipc needs cuda.bindings"),
        ("{backend: cuda-ipc}", apart(3, 1, 2), "transfer.backend: GPUs 1 and 2 cannot reach each other's memory"),
        ("{backend: mooncake}", beside(0, None), "transfer.backend: no Mooncake package is installed"),
        ("{backend: mooncake, protocol: nvlink}", beside(0, CPU), "transfer.protocol: nvlink is between whole GPUs"),
        ("{backend: mooncake}", beside(3, CPU), f"transfer.backend: {CPU} knows no GPUs"),
        ("{protocol: tcp}", beside(0, CPU), "transfer.protocol: tcp is a protocol of Mooncake's"),
        ("{backend: zmq, protocol: tcp}", beside(0, CPU), "transfer.protocol: tcp is a protocol of Mooncake's"),
    ],
)
def test_what_cannot_be_is_refused(transfer: str, hardware: Hardware, problem: str) -> None:
    with pytest.raises(PlacementError) as caught:
        plan(f"{EPD}transfer: {transfer}", hardware)
    (line,) = caught.value.message.splitlines()
    assert line.startswith("test.yaml:3:")
    assert problem in line
