"""What is made of CUDA's answers: its real types, and functions that answer as they are told."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from epdctl.errors import PeerGone, TransferError, UserError
from epdctl.transfer.cuda import HANDLE_BYTES, _Gpu, _Stream
from epdctl.transfer.runs import Run

runtime = pytest.importorskip("cuda.bindings.runtime", reason="comes with torch's CUDA builds")
DEVICE = torch.device("cuda:1")
HANDLE = bytes(range(HANDLE_BYTES))
OK = runtime.cudaError_t.cudaSuccess
RUNS = [Run(1, 100, 10), Run(50, 200, 20)]


class Calls:
    """The runtime, and the driver's one function; ``answers``: in place of success, by name."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.said: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(runtime, name)

    def _called(self, name: str, *words: Any) -> Any:
        self.said.append((name, *words))
        return self.answers.get(name, OK)

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return OK, self.answers.get("version", 13_000)

    def cudaSetDevice(self, index: int) -> None:
        self._called("device", index)

    def cuMemGetAddressRange(self, address: int) -> tuple[Any, int, int]:
        return self._called("range", address), address - 64, 4096

    def cudaIpcGetMemHandle(self, base: int) -> tuple[Any, Any]:
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), HANDLE, HANDLE_BYTES)
        return self._called("export", base), handle

    def cudaIpcOpenMemHandle(self, handle: Any, _: int) -> tuple[Any, int]:
        return self._called("open", ctypes.string_at(handle.getPtr(), HANDLE_BYTES)), 7000

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[Any]:
        return (self._called("close", address),)

    def cudaMemcpyBatchAsync(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], *_: Any
    ) -> Any:
        answer = self._called("batch", sources, targets, sizes)
        return answer if isinstance(answer, tuple) else (answer,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, *_: Any) -> tuple[Any]:
        return (self._called("copy", source, target, nbytes),)


class Stream:
    cuda_stream = 5
    device = DEVICE

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    def synchronize(self) -> None:
        if self.error is not None:
            raise RuntimeError(self.error)


def gpu(**answers: Any) -> tuple[_Gpu, Calls]:
    calls = Calls(**answers)
    return _Gpu(DEVICE, calls, calls), calls


def stream(calls: Calls, *, batches: bool = True, error: str | None = None) -> _Stream:
    return _Stream(Stream(error), calls, batches=batches)  # type: ignore[arg-type]


def test_memory_is_shared_by_the_allocation_around_it() -> None:
    cuda, calls = gpu()
    assert cuda.share(1064) == (HANDLE, 64)
    assert calls.said == [("device", 1), ("range", 1064), ("export", 1000)]


@pytest.mark.parametrize("step", ["range", "export"])
def test_memory_that_is_nobody_elses_is_the_plans_fault(step: str) -> None:
    cuda, _ = gpu(**{step: runtime.cudaError_t.cudaErrorInvalidValue})
    with pytest.raises(UserError, match="memory of cuda:1 cannot be shared with other processes: cudaErrorInvalid"):
        cuda.share(1064)


def test_what_was_shared_is_opened_on_this_ranks_gpu_and_closed_again() -> None:
    cuda, calls = gpu()
    assert cuda.open(HANDLE) == 7000
    cuda.close(7000)
    assert calls.said == [("device", 1), ("open", HANDLE), ("device", 1), ("close", 7000)]


@pytest.mark.parametrize(
    ("answer", "error"),
    [("cudaErrorPeerAccessUnsupported", TransferError), ("cudaErrorMapBufferObjectFailed", PeerGone)],
)
def test_why_memory_cannot_be_opened(answer: str, error: type[Exception]) -> None:
    cuda, _ = gpu(open=getattr(runtime.cudaError_t, answer))
    with pytest.raises(error, match=answer):
        cuda.open(HANDLE)


def test_a_handle_of_another_length_is_not_given_to_cuda() -> None:
    cuda, calls = gpu()
    with pytest.raises(TransferError, match="a handle of 3 bytes"):
        cuda.open(b"abc")
    assert not calls.said


def test_memory_that_stays_open_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cuda, _ = gpu(close=runtime.cudaError_t.cudaErrorInvalidValue)
    with caplog.at_level(logging.WARNING):
        cuda.close(7000)
    assert "stays open until this process ends: cudaErrorInvalidValue" in caplog.text


def test_many_copies_are_one_call_where_the_driver_takes_that() -> None:
    calls = Calls()
    stream(calls).begin(RUNS)
    assert calls.said == [("batch", [1, 50], [100, 200], [10, 20])]


def test_an_older_driver_is_called_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, calls = gpu(version=12_060)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Stream())
    cuda.copies().begin(RUNS)
    assert calls.said == [("device", 1), ("copy", 1, 100, 10), ("copy", 50, 200, 20)]


BAD = runtime.cudaError_t.cudaErrorIllegalAddress


@pytest.mark.parametrize(("batches", "answer"), [(True, (BAD, 1)), (True, (BAD,)), (False, BAD)])
def test_copies_that_cannot_begin(batches: bool, answer: Any) -> None:
    """Of CUDA 12 the answer also says which copy was at fault."""
    copies = stream(Calls(batch=answer, copy=answer), batches=batches)
    with pytest.raises(TransferError, match="cuda:1 does not copy: cudaErrorIllegalAddress"):
        copies.begin(RUNS)


def test_copies_that_do_not_end() -> None:
    with pytest.raises(TransferError, match="cuda:1 did not finish its copies: CUDA error: an illegal"):
        stream(Calls(), error="CUDA error: an illegal address\nmore").finish()
