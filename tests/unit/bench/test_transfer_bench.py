"""What ``epdctl bench transfer`` measures, and what of it is offered on which machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from epdctl.bench import transfer
from epdctl.bench.plot import draw
from epdctl.bench.transfer import TRANSPORTS, Row, available, run, suggestions
from epdctl.errors import EpdError, UserError
from epdctl.topology.hardware import Hardware
from epdctl.transfer.rdma import RdmaDevices
from tests.unit.topology.support import gpu, machine

KEYS = ["transport", "bytes", "p50_us", "gb_per_s", "ceiling_gb_per_s", "register_us"]


def names(hardware: Hardware) -> list[str]:
    return [way.name for way in available(hardware)]


def beside(gpus: int, mooncake: str | None) -> Hardware:
    return Hardware(tuple(gpu(index) for index in range(gpus)), 2, mooncake=mooncake)


def test_only_what_this_machine_has_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "rdma_devices", RdmaDevices)
    assert names(machine()) == ["zmq", "zmq-tcp", "shm", "shm-in-slot"]
    assert names(beside(0, "mooncake-transfer-engine-non-cuda"))[-2:] == ["shm-in-slot", "mooncake-tcp"]
    ipc, nvlink = (
        [f"gpu-{way}{more}" for more in ("", "-opened", "-pages", "-scattered")]
        for way in ("cuda-ipc", "mooncake-nvlink")
    )
    assert names(beside(2, "mooncake-transfer-engine-cuda13"))[-9:] == [*ipc, *nvlink, "gpu-zmq"]
    assert names(beside(2, None))[-5:] == [*ipc, "gpu-zmq"]
    assert names(beside(2, "mooncake-transfer-engine-non-cuda"))[-1] == "gpu-zmq"
    assert "gpu-zmq" not in names(beside(1, "mooncake-transfer-engine-cuda13"))
    slices = Hardware((gpu(0, "MIG-1", "GPU-9"), gpu(0, "MIG-2", "GPU-9")), 2)
    assert "gpu-zmq" not in names(slices)
    monkeypatch.setattr(transfer, "rdma_devices", lambda: RdmaDevices(("mlx5_0",)))
    assert "mooncake-rdma" not in names(beside(0, "mooncake-transfer-engine-non-cuda")), "it cannot be opened"
    monkeypatch.setattr(transfer, "rdma_devices", lambda: RdmaDevices(("mlx5_0",), ("uverbs0",)))
    assert "mooncake-rdma" in names(beside(0, "mooncake-transfer-engine-non-cuda"))


@pytest.mark.parametrize(("wanted", "largest"), [(["pigeon"], "1MiB"), ([], "much")])
def test_a_slip_is_a_usage_error(wanted: list[str], largest: str) -> None:
    with pytest.raises(UserError, match=r"pigeon|much"):
        run(wanted, largest, {"CUDA_VISIBLE_DEVICES": ""}, print)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """On a machine with nothing but memory: the names of what came to be measured, each with one row."""
    tried: list[str] = []

    def measure(way: transfer.Way, *_: object) -> list[Row]:
        tried.append(way.name)
        return [Row(transport=way.name, bytes=1, p50_us=1.0, gb_per_s=1.0, ceiling_gb_per_s=1.0, register_us=1.0)]

    monkeypatch.setattr(transfer, "probe", lambda environ: machine())
    monkeypatch.setattr(transfer, "rdma_devices", RdmaDevices)
    monkeypatch.setattr(transfer, "_measure", measure)
    return tried


def refusal(*wanted: str, largest: str = "1GiB") -> UserError:
    with pytest.raises(UserError) as caught:
        run(wanted, largest, {}, print)
    return caught.value


MOONCAKE = "no Mooncake package is installed (`epdctl doctor` prints the line that does it)"


def test_of_each_transport_that_cannot_be_tried_is_told_why(measured: list[str]) -> None:
    error = refusal("mooncake-rdma", "gpu-zmq", "gpu-mooncake-nvlink", "mooncake-tcp")
    needs = "it needs two GPUs, and none can be seen"
    assert error.message.splitlines() == [
        f"mooncake-tcp: cannot be tried here: {MOONCAKE}",
        f"mooncake-rdma: cannot be tried here: {MOONCAKE}; this machine has no RDMA device",
        f"gpu-mooncake-nvlink: cannot be tried here: {needs}; {MOONCAKE}",
        f"gpu-zmq: cannot be tried here: {needs}",
    ]
    assert measured == []


def test_gpus_that_will_not_do_and_a_package_without_them_are_told(
    monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    package = "mooncake-transfer-engine-non-cuda"
    monkeypatch.setattr(transfer, "probe", lambda environ: beside(1, package))
    assert refusal("gpu-zmq").message.endswith(": it needs two GPUs, and 1 can be seen")
    monkeypatch.setattr(transfer, "probe", lambda environ: beside(2, package))
    assert f": {package} knows no GPUs (" in refusal("gpu-mooncake-nvlink").message
    slices = Hardware((gpu(0), gpu(1, "MIG-2", "GPU-9")), 2)
    monkeypatch.setattr(transfer, "probe", lambda environ: slices)
    assert refusal("gpu-zmq").message.endswith("one of the first two is a MIG slice")


def test_a_limit_below_every_size_is_told(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    assert refusal("shm", largest="1KiB").message == (
        "shm: cannot be tried here: --largest is below its smallest size, 4KiB"
    )
    monkeypatch.setattr(transfer, "probe", lambda environ: beside(2, None))
    run(["gpu-cuda-ipc-pages"], "1KiB", {}, print)  # an embedding and a KV cache are measured between GPUs whatever
    assert measured == ["gpu-cuda-ipc-pages"]


def test_beside_one_that_can_be_tried_the_others_are_said(
    measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(["shm", "mooncake-tcp"], "1MiB", {}, print)
    assert capsys.readouterr().out == f"mooncake-tcp: cannot be tried here: {MOONCAKE}\n"
    assert measured == ["shm"]


def test_without_names_what_is_not_here_is_not_told(measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run([], "1MiB", {}, print)
    assert (measured, capsys.readouterr().out) == (["zmq", "zmq-tcp", "shm", "shm-in-slot"], "")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("cuda-ipc", ["gpu-cuda-ipc", "gpu-cuda-ipc-opened", "gpu-cuda-ipc-pages", "gpu-cuda-ipc-scattered"]),
        ("cuda_IPC-pages", ["gpu-cuda-ipc-pages"]),
        ("rdma", ["mooncake-rdma"]),
        ("zqm-tcp", ["zmq-tcp"]),
        ("pigeon", []),
        ("", []),
    ],
)
def test_a_name_that_is_nearly_one(word: str, near: list[str]) -> None:
    assert suggestions(word, [way.name for way in TRANSPORTS]) == near


def test_every_name_that_is_none_is_told_with_what_was_meant(measured: list[str]) -> None:
    error = refusal("shm", "rdma", "pigeon")
    assert error.message.splitlines() == [
        "no transport is called 'pigeon'",
        "no transport is called 'rdma'; did you mean mooncake-rdma?",
    ]
    assert error.hint is not None
    assert error.hint.startswith("there are: gpu-cuda-ipc, ")
    assert measured == []


def test_a_transport_that_does_not_work_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> list[Row]:
        raise EpdError("it fell to another protocol")

    monkeypatch.setattr(transfer, "_measure", refuse)
    assert transfer.measure([transfer.Way("broken", "pigeon")], [4096], (), print) == []
    assert capsys.readouterr().out == "broken: does not work here: it fell to another protocol\n"


def test_an_end_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer, "ANSWER_SECONDS", 0.01)
    deaf = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    process = subprocess.Popen(deaf, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with (tmp_path / "words").open("w+") as words:
        end = transfer._End(process, words)
        with pytest.raises(EpdError, match="no answer to receive within"):
            end.ask(do="receive")
        end.close()
    assert process.returncode == 0


def test_the_command_measures_between_two_processes_and_draws(tmp_path: Path) -> None:
    plot, output = tmp_path / "plot.png", tmp_path / "rows.json"
    words = ["bench", "transfer", "shm", "--largest", "64KiB", "--plot", str(plot), "--output", str(output), "--json"]
    done = subprocess.run([sys.executable, "-m", "epdctl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows == json.loads(output.read_text())
    assert [row["bytes"] for row in rows] == [4096, 65536]
    for row in rows:
        assert list(row)[:6] == KEYS
        assert all(row[key] > 0 for key in (*KEYS[2:], "summed_us"))
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_a_picture_of_one_point_is_a_picture_too(tmp_path: Path) -> None:
    row = Row(transport="zmq", bytes=4096, p50_us=1.0, gb_per_s=4.1, ceiling_gb_per_s=9.0, register_us=1.0)
    draw({"zmq": [(row.bytes, row.gb_per_s)]}, "one", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (900, 560)
