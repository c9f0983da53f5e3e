"""How fast each transport moves bytes between two processes of this machine, beside a plain copy of the same run."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import msgspec

from epdctl.errors import EpdError, UserError
from epdctl.topology.hardware import Gpu, Hardware, probe, usable_cores
from epdctl.topology.moving import WITHOUT_CUDA
from epdctl.topology.values import parse_size
from epdctl.topology.words import closest
from epdctl.transfer.rdma import rdma_devices
from epdctl.wire.variables import MOONCAKE, environment

__all__ = [
    "EMBEDDING",
    "KV",
    "KV_PAGE",
    "SIZES",
    "TRANSPORTS",
    "Row",
    "Way",
    "available",
    "measure",
    "run",
    "suggestions",
]

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
EMBEDDING = 10_368 * 3_584 * 2  # eight pictures of 1008 x 1008 for a model of 3,584, in 16 bits
KV_PAGE = 16 * 57_344  # 16 tokens of a 7B
KV = 650 * KV_PAGE  # 10,400 tokens
USED_RUN = 11  # pages: of pools of 16,384, 80 % taken by requests of 20 to 650, 650 lie in 29 pieces at either end
GPU_SIZES = (EMBEDDING, KV)
ROUND_BYTES = 1 << 30  # about so many in all for one figure
END_SECONDS = 20.0
ANSWER_SECONDS = 600.0  # of one order: up to 100 writes, each seen to the end
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Way:
    """One transport as it is measured. ``page``: bytes of the pages; 0: one piece. ``run``: so many of them lie side by
    side. ``tcp``: ZMQ without a file system.
    ``opened``: the write has begun before it is timed, as an encoder begins it while its tower runs. ``in_place``: and
    what is written has been made in the slot.
    """

    name: str
    backend: str
    protocol: str = ""
    gpu: bool = False
    page: int = 0
    run: int = 1
    opened: bool = False
    in_place: bool = False
    tcp: bool = False


TRANSPORTS = (
    Way("zmq", "zmq"),
    Way("zmq-tcp", "zmq", tcp=True),
    Way("shm", "shm"),
    Way("shm-in-slot", "shm", in_place=True),
    Way("mooncake-tcp", "mooncake", "tcp"),
    Way("mooncake-rdma", "mooncake", "rdma"),
    Way("gpu-cuda-ipc", "cuda-ipc", gpu=True),
    Way("gpu-cuda-ipc-opened", "cuda-ipc", gpu=True, opened=True),
    Way("gpu-cuda-ipc-pages", "cuda-ipc", gpu=True, page=KV_PAGE, run=USED_RUN),
    Way("gpu-cuda-ipc-scattered", "cuda-ipc", gpu=True, page=KV_PAGE),
    Way("gpu-mooncake-nvlink", "mooncake", "nvlink", gpu=True),
    Way("gpu-mooncake-nvlink-opened", "mooncake", "nvlink", gpu=True, opened=True),
    Way("gpu-mooncake-nvlink-pages", "mooncake", "nvlink", gpu=True, page=KV_PAGE, run=USED_RUN),
    Way("gpu-mooncake-nvlink-scattered", "mooncake", "nvlink", gpu=True, page=KV_PAGE),
    Way("gpu-zmq", "zmq", gpu=True),
)


class Row(msgspec.Struct, frozen=True):
    """``p50_us``: until the receiver may read; ``summed_us``: until it has summed every byte (on CPUs);
    ``moving_gb_per_s``: in the movement alone, without what is said before and after (where that is known)."""

    transport: str
    bytes: int
    p50_us: float
    gb_per_s: float
    ceiling_gb_per_s: float
    register_us: float
    summed_us: float | None = None
    moving_gb_per_s: float | None = None


def run(wanted: Sequence[str], largest: str, environ: Mapping[str, str], say: Say) -> list[Row]:
    """What ``wanted`` names, or everything that this machine has. Raises UserError."""
    if unknown := sorted(set(wanted) - {way.name for way in TRANSPORTS}):
        raise _unknown(unknown)
    limit = _bytes(largest)
    hardware = probe(environ)
    sizes = [size for size in SIZES if size <= limit]
    ways = _named(wanted, hardware, sizes, say) if wanted else available(hardware)
    rows = measure(ways, sizes, hardware.gpus, say)
    if not rows:
        raise EpdError("no transport could be measured", hint="`epdctl doctor` says what is missing")
    return rows


def _unknown(names: Sequence[str]) -> UserError:
    known = sorted(way.name for way in TRANSPORTS)
    lines = []
    for name in names:
        near = suggestions(name, known)
        lines.append(f"no transport is called {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return UserError("\n".join(lines), hint=f"there are: {', '.join(known)}")


def suggestions(name: str, known: Sequence[str]) -> list[str]:
    """Those of ``known`` that have the word in them; else the one that looks like it."""
    word = name.lower().replace("_", "-")
    if holding := [each for each in known if word and word in each]:
        return holding
    near = closest(name, known)
    return [] if near is None else [near]


def _named(wanted: Sequence[str], hardware: Hardware, sizes: Sequence[int], say: Say) -> list[Way]:
    """Those of them that can be tried; of the others is said why not. Raises UserError where none can."""
    named = [way for way in TRANSPORTS if way.name in wanted]
    against = {way.name: [*_troubles(way, hardware), *_too_large(way, sizes)] for way in named}
    told = [f"{name}: cannot be tried here: {'; '.join(troubles)}" for name, troubles in against.items() if troubles]
    if len(told) == len(named):
        raise UserError("\n".join(told), hint="`epdctl bench transfer` without names measures what this machine has")
    for line in told:
        say(line)
    return [way for way in named if not against[way.name]]


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--largest {text}: should be a size like 64MiB or 1GiB") from error


def available(hardware: Hardware) -> list[Way]:
    """What can be tried here; whether it works is seen when it is."""
    return [way for way in TRANSPORTS if not any(_troubles(way, hardware))]


def _troubles(way: Way, hardware: Hardware) -> Iterator[str]:
    """What this machine lacks for it."""
    if way.gpu:
        if len(hardware.gpus) < 2:
            yield f"it needs two GPUs, and {len(hardware.gpus) or 'none'} can be seen"
        elif any(gpu.mig_parent for gpu in hardware.gpus[:2]):
            yield "it needs two whole GPUs, and one of the first two is a MIG slice"
    if way.backend != "mooncake":
        return
    if hardware.mooncake is None:
        yield "no Mooncake package is installed (`epdctl doctor` prints the line that does it)"
    elif way.gpu and hardware.mooncake == WITHOUT_CUDA:
        yield f"{WITHOUT_CUDA} knows no GPUs (`epdctl doctor` prints the line that installs another)"
    if way.protocol == "rdma" and (trouble := rdma_devices().trouble) is not None:
        yield trouble


def _too_large(way: Way, sizes: Sequence[int]) -> Iterator[str]:
    if not _sizes_of(way, sizes):
        yield f"--largest is below its smallest size, {_sizes_of(way, SIZES)[0] >> 10}KiB"


def _sizes_of(way: Way, sizes: Sequence[int]) -> list[int]:
    return sorted({size for size in (*sizes, *(GPU_SIZES if way.gpu else ())) if size >= way.page})


def measure(ways: Sequence[Way], sizes: Sequence[int], gpus: Sequence[Gpu], say: Say) -> list[Row]:
    """A transport that does not work is said and left out."""
    rows: list[Row] = []
    for way in ways:
        try:
            rows += _measure(way, _sizes_of(way, sizes), gpus, say)
        except EpdError as error:
            say(f"{way.name}: does not work here: {error.message}")
    return rows


def _measure(way: Way, sizes: Sequence[int], gpus: Sequence[Gpu], say: Say) -> list[Row]:
    both = [gpu.uuid for gpu in gpus[:2]] if way.gpu else ["", ""]
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="epd-"))
        common = {
            "backend": way.backend, "protocol": way.protocol, "gpu": way.gpu, "tcp": way.tcp,
            "sockets": sockets, "token": secrets.token_hex(16),
        }  # fmt: skip
        with _end(",".join(both) if way.gpu else "", way) as plain:
            ceilings = plain.ask(do="ceiling", gpu=way.gpu, sizes=list(sizes), rounds=10)["rates"]
        receiver = stack.enter_context(_end(both[1], way))
        opened = receiver.ask(do="receive", sizes=list(sizes), page=way.page, run=way.run, **common)
        say(f"{way.name}: {opened['note']}")
        writer = stack.enter_context(_end(both[0], way))
        writer.ask(do="attach", notify=opened["notify"], **common)
        return [
            _row(way, size, ceiling, lease, writer)
            for size, ceiling, lease in zip(sizes, ceilings, opened["leases"], strict=True)
        ]


def _row(way: Way, size: int, ceiling: float, opened: dict[str, Any], writer: _End) -> Row:
    rounds = max(5, min(100, ROUND_BYTES // size))
    found = writer.ask(
        do="write",
        lease=opened["lease"],
        bytes=size,
        rounds=rounds,
        opened=way.opened,
        in_place=way.in_place,
        sum=not way.gpu and not way.page,
        pooled=bool(way.page),
    )
    seconds, summed, moving = (_median(found[name]) for name in ("written", "summed", "moving"))
    assert seconds is not None, "every write was timed"
    return Row(
        transport=way.name,
        bytes=size,
        p50_us=round(seconds * 1e6, 1),
        gb_per_s=round(size / seconds / 1e9, 3),
        ceiling_gb_per_s=round(ceiling, 3),
        register_us=round(opened["register_us"], 1),
        summed_us=None if summed is None else round(summed * 1e6, 1),
        moving_gb_per_s=None if moving is None else round(size / moving / 1e9, 3),
    )


def _median(seconds: Sequence[float | None]) -> float | None:
    """None where one of them was not measured."""
    known = [each for each in seconds if each is not None]
    return statistics.median(known) if len(known) == len(seconds) else None


class _End:
    """One process, asked by lines."""

    def __init__(self, process: subprocess.Popen[str], words: IO[str]) -> None:
        self._process = process
        self._words = words

    def ask(self, **order: Any) -> dict[str, Any]:
        """Raises EpdError when it ends instead of answering, with its last words, or does not answer at all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            raise EpdError(f"no answer to {order['do']} within {ANSWER_SECONDS:g} s")
        line = self._process.stdout.readline()  # each answer is one, and nothing comes unasked
        if not line:
            self._process.wait()
            raise EpdError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._process.returncode}"

    def close(self) -> None:
        """The end of its input is its end; one that does not take it is killed."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def _end(visible: str, way: Way) -> Iterator[_End]:
    """A process that sees the GPUs ``visible`` and no others, as a rank does."""
    share = str(max(1, usable_cores() // 2))  # what a plan gives each of two ranks
    own = {
        "OMP_NUM_THREADS": share, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0",
        "CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip
    foreign = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", *MOONCAKE.values()}
    inherited = {name: value for name, value in os.environ.items() if name not in foreign}
    environ = inherited | own | environment(way.backend, way.protocol)
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "epdctl.bench.ends"],
            env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True,
        )  # fmt: skip
        end = _End(process, words)
        try:
            yield end
        finally:
            end.close()
