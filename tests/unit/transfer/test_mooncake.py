"""What stands around Mooncake's engine, with an engine that only notes what it is asked."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from epdctl.errors import RegistrationFailed, TransferError, UserError
from epdctl.transfer import mooncake, mooncake_engine
from epdctl.transfer.mooncake import MooncakeMover
from epdctl.transfer.mooncake_engine import PROTOCOLS, Engine, engine_of, probe
from epdctl.transfer.movers import Put
from epdctl.transfer.rdma import RdmaDevices, rdma_devices
from epdctl.transfer.runs import Run
from epdctl.wire.transfer import PoolLocation
from epdctl.wire.variables import MOONCAKE

CPU = torch.device("cpu")


class Pretender:
    """Takes every write; ``delivers``: and really moves the bytes, within this process."""

    def __init__(self, *, delivers: bool = True, status: int = 0) -> None:
        self.delivers = delivers
        self.status = status
        self.writes: list[list[tuple[int, int, int]]] = []
        self.registered: dict[int, int] = {}

    def initialize(self, *_: str) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 7

    def register_memory(self, address: int, nbytes: int) -> int:
        self.registered[address] = nbytes
        return self.status

    def unregister_memory(self, address: int) -> int:
        del self.registered[address]
        return 0

    def batch_transfer_sync_write(self, to: str, own: list[int], theirs: list[int], sizes: list[int]) -> int:
        assert to == "127.0.0.1:7"
        runs = list(zip(own, theirs, sizes, strict=True))
        self.writes.append(runs)
        if self.delivers and self.status == 0:
            for source, target, nbytes in runs:
                _bytes_at(target, nbytes)[:] = _bytes_at(source, nbytes)
        return self.status


def _bytes_at(address: int, nbytes: int) -> memoryview:
    import ctypes

    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine(Pretender(), "tcp")
    monkeypatch.setattr(mooncake, "engine_of", lambda _protocol: made)
    return made


def writes(engine: Engine) -> list[list[tuple[int, int, int]]]:
    raw = engine._raw
    assert isinstance(raw, Pretender)
    return raw.writes


def test_a_write_is_one_call_with_a_run_for_each_piece(engine: Engine) -> None:
    mover = MooncakeMover("tcp", CPU)
    pool = mover.allocate(4096, CPU).zero_()
    remote = mover.reach(mover.locate("kv", pool))
    pages = torch.arange(40, dtype=torch.uint8)
    writes(engine).clear()
    remote.put([Put(pages[:20], 0), Put(pages[20:], 100)], threading.Event())
    start, base = pages.data_ptr(), pool.data_ptr()
    assert writes(engine) == [[(start, base, 20), (start + 20, base + 100, 20)]]
    assert torch.equal(pool[100:120], pages[20:])
    mover.close()
    assert not engine._known


def test_a_writer_that_was_told_to_stop_writes_no_further_batch(engine: Engine) -> None:
    stop = threading.Event()
    stop.set()
    mover = MooncakeMover("tcp", CPU)
    remote = mover.reach(mover.locate("kv", mover.allocate(64, CPU)))
    writes(engine).clear()
    remote.put([Put(torch.zeros(8, dtype=torch.uint8), 0)], stop)
    assert writes(engine) == []


def test_what_must_be_registered_goes_through_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Engine(Pretender(), "rdma")
    monkeypatch.setattr(mooncake, "engine_of", lambda _protocol: made)
    monkeypatch.setattr(mooncake, "STAGE_BYTES", 100)
    mover = MooncakeMover("rdma", CPU)
    pool, own = mover.allocate(1000, CPU).zero_(), mover.allocate(50, CPU).fill_(9)
    foreign = torch.arange(250, dtype=torch.uint8)
    writes(made).clear()
    mover.reach(mover.locate("kv", pool)).put([Put(foreign, 0), Put(own, 500)], threading.Event())
    assert torch.equal(pool[:250], foreign)
    assert torch.equal(pool[500:550], own)
    assert [[nbytes for _, _, nbytes in runs] for runs in writes(made)] == [[50], [100], [100], [50]]
    mover.close()
    assert not made._known


def test_memory_of_others_is_no_pool(engine: Engine) -> None:
    mover = MooncakeMover("tcp", CPU)
    with pytest.raises(RegistrationFailed, match="not allocated by this transport"):
        mover.locate("kv", torch.zeros(8, dtype=torch.uint8))


def test_errors_of_the_engine_are_ours() -> None:
    refusing = Engine(Pretender(status=-1), "tcp")
    with pytest.raises(RegistrationFailed, match="does not take 8 bytes on cpu"):
        refusing.register(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(TransferError, match=r"did not deliver 8 bytes to 127\.0\.0\.1:7"):
        refusing.write("127.0.0.1:7", [Run(0, 0, 8)])


def test_the_probe_believes_bytes_and_not_words() -> None:
    with pytest.raises(UserError, match="and they were not"):
        probe(Engine(Pretender(delivers=False), "tcp"), CPU)


def test_a_protocol_that_fell_to_a_slower_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {name: getattr(PROTOCOLS["nvlink"], name) for name in PROTOCOLS["nvlink"].__dataclass_fields__}
    way = mooncake_engine.Way(**quick | {"probe_bytes": 1 << 16, "least_gb_per_s": 1e9})
    monkeypatch.setitem(PROTOCOLS, "nvlink", way)
    with pytest.raises(UserError, match="it fell to another protocol"):
        probe(Engine(Pretender(), "nvlink"), CPU)


def test_rdma_needs_a_device_that_can_be_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rdma_devices(tmp_path).trouble == "this machine has no RDMA device"
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    trouble = rdma_devices(tmp_path).trouble
    assert trouble is not None
    assert trouble.startswith("mlx5_0 cannot be opened: no /dev/infiniband/uverbs*")
    told(monkeypatch, "rdma")
    monkeypatch.setattr(mooncake_engine, "rdma_devices", lambda: rdma_devices(tmp_path))
    engine_of.cache_clear()
    with pytest.raises(UserError, match="protocol rdma: mlx5_0 cannot be opened"):
        engine_of("rdma")
    (tmp_path / "dev/infiniband/uverbs0").touch()
    assert rdma_devices(tmp_path) == RdmaDevices(("mlx5_0",), ("uverbs0",))
    assert rdma_devices(tmp_path).trouble is None


def test_the_engine_itself_refuses_devices_that_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, beside files that pretend a device: it was seen to take TCP and be called rdma in the status."""
    pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    code = """
import torch
from epdctl.transfer import mooncake_engine
from epdctl.transfer.mooncake import MooncakeMover
from epdctl.transfer.rdma import RdmaDevices
mooncake_engine.rdma_devices = lambda: RdmaDevices(("mlx5_0",), ("uverbs0",))
MooncakeMover("rdma", torch.device("cpu"))
"""
    told(monkeypatch, "rdma")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "UserError: Mooncake does not start with protocol rdma" in done.stderr


def told(monkeypatch: pytest.MonkeyPatch, *protocols: str) -> None:
    for variable in MOONCAKE.values():
        monkeypatch.delenv(variable, raising=False)
    for protocol in protocols:
        monkeypatch.setenv(MOONCAKE[protocol], "1")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What an engine listens on that binds to every address, as the real one does; started as the only one."""
    server = socket.socket()

    class Listening(Pretender):
        def initialize(self, *_: str) -> int:
            server.listen()
            return 0

    monkeypatch.setitem(sys.modules, "mooncake.engine", SimpleNamespace(TransferEngine=Listening))
    engine_of.cache_clear()
    with server:
        yield server
    engine_of.cache_clear()


def test_the_engines_ports_are_kept_on_the_loopback(opened: socket.socket) -> None:
    assert engine_of("tcp").private
    assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b"lo\0"
    assert "open" not in MooncakeMover("tcp", CPU).note


def test_ports_that_stay_open_are_told_in_the_status(opened: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(_: frozenset[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(mooncake_engine, "keep_on_loopback", forbid)
    assert not engine_of("tcp").private
    assert MooncakeMover("tcp", CPU).note.endswith("; its ports are open to other machines")


@pytest.mark.parametrize(
    ("protocol", "told_as"),
    [("nvlink", ()), ("tcp", ()), ("tcp", ("nvlink",)), ("nvlink", ("tcp", "nvlink")), ("rdma", ("tcp",))],
)
def test_the_engine_is_told_its_protocol_and_no_other(
    monkeypatch: pytest.MonkeyPatch, protocol: str, told_as: tuple[str, ...]
) -> None:
    engine_of.cache_clear()
    told(monkeypatch, *told_as)
    with pytest.raises(UserError, match=f"protocol {protocol} needs {MOONCAKE[protocol]}=1 in the environment"):
        engine_of(protocol)


def test_an_engine_that_took_tcp_in_place_of_rdma_is_refused(
    opened: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, "rdma")
    monkeypatch.setattr(mooncake_engine, "rdma_devices", lambda: RdmaDevices(("mlx5_0",), ("uverbs0",)))
    with pytest.raises(UserError, match="told to use RDMA and took TCP"):
        engine_of("rdma")
    assert opened.getsockname()[1] != 7, "it listens beside the port where engines introduce themselves"


def test_an_engine_that_did_not_take_tcp_is_refused(opened: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretender, "get_rpc_port", lambda _: opened.getsockname()[1])
    with pytest.raises(UserError, match="told to use TCP and took another protocol"):
        engine_of("tcp")


def test_a_location_is_told_in_the_engines_terms(engine: Engine) -> None:
    mover = MooncakeMover("tcp", CPU)
    pool = mover.allocate(512, CPU)
    assert mover.locate("kv", pool) == PoolLocation(pool="kv", place="127.0.0.1:7", base=pool.data_ptr(), nbytes=512)
