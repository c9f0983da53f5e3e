"""What is used of CUDA to reach memory of another process's GPU. Its errors end here.

The calls are those of ``cuda.bindings``, which every CUDA build of torch brings along.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from epdctl.errors import PeerGone, TransferError, UserError
from epdctl.transfer.runs import Run

__all__ = ["Copies", "Cuda", "Shared", "open_cuda"]

log = logging.getLogger(__name__)

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
BATCH_COPIES = 12_080  # the CUDA version since which a driver takes many copies in one call


class Shared(NamedTuple):
    """An allocation of this process that others may open, by its ``handle``. ``before``: bytes of it that lie before
    the address that was asked for.
    """

    handle: bytes
    before: int


class Copies(Protocol):
    """Copies in the order given, beside whatever else the GPU does. Used from one thread."""

    def begin(self, runs: Sequence[Run]) -> None:
        """Raises TransferError."""
        ...

    def finish(self) -> None:
        """Back when every byte is there. Raises TransferError; then nobody knows."""
        ...


class Cuda(Protocol):
    """One GPU, from any thread."""

    def share(self, address: int) -> Shared:
        """Raises UserError where this GPU's memory is its process's own."""
        ...

    def open(self, handle: bytes) -> int:
        """The address here of an allocation of another process, for as long as it is open here, whatever becomes of
        that process. Raises PeerGone where it is gone already, TransferError where this GPU cannot reach the other.
        """
        ...

    def close(self, address: int) -> None: ...

    def free(self) -> int:
        """Bytes of the GPU that nobody has."""
        ...

    def read(self, address: int, nbytes: int) -> bytes:
        """Raises TransferError."""
        ...

    def copies(self) -> Copies: ...


class _Stream:
    """Copies by the GPU's copy engines, which leave its processors alone."""

    def __init__(self, stream: torch.cuda.Stream, runtime: Any, *, batches: bool) -> None:
        self._runtime = runtime
        self._batches = batches
        self._stream = stream
        self._handle = runtime.cudaStream_t(stream.cuda_stream)
        self._how = runtime.cudaMemcpyAttributes()
        self._how.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        self._how.flags = int(runtime.cudaMemcpyFlags.cudaMemcpyFlagPreferOverlapWithCompute)

    def begin(self, runs: Sequence[Run]) -> None:
        sources, targets, sizes = map(list, zip(*runs, strict=True))
        if self._batches:
            count = len(sizes)
            self._must(
                self._runtime.cudaMemcpyBatchAsync(targets, sources, sizes, count, [self._how], [0], 1, self._handle)
            )
            return
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        for run in runs:
            self._must(self._runtime.cudaMemcpyAsync(run.target, run.source, run.nbytes, kind, self._handle))

    def _must(self, answer: tuple[Any, ...]) -> None:
        if answer[0] != 0:
            raise TransferError(f"{self._stream.device} does not copy: {answer[0].name}")

    def finish(self) -> None:
        try:
            self._stream.synchronize()
        except RuntimeError as error:
            raise TransferError(
                f"{self._stream.device} did not finish its copies: {str(error).splitlines()[0]}"
            ) from error


class _Gpu:
    """A Cuda."""

    def __init__(self, device: torch.device, runtime: Any, driver: Any) -> None:
        self._device = device
        self._runtime = runtime
        self._driver = driver
        _, version = runtime.cudaDriverGetVersion()
        self._batches = version >= BATCH_COPIES
        self._reach_us = [
            runtime.cudaError_t.cudaErrorPeerAccessUnsupported,
            runtime.cudaError_t.cudaErrorTooManyPeers,
            runtime.cudaError_t.cudaErrorNotSupported,
        ]

    def share(self, address: int) -> Shared:
        self._enter()
        error, base, _ = self._driver.cuMemGetAddressRange(address)
        if error == 0:
            error, handle = self._runtime.cudaIpcGetMemHandle(int(base))
        if error != 0:
            raise UserError(
                f"memory of {self._device} cannot be shared with other processes: {error.name}",
                hint="write transfer.backend: zmq",
            )
        return Shared(ctypes.string_at(handle.getPtr(), HANDLE_BYTES), address - int(base))

    def open(self, handle: bytes) -> int:
        if len(handle) != HANDLE_BYTES:
            raise TransferError(f"a handle of {len(handle)} bytes is none of CUDA's")
        self._enter()
        named = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(named.getPtr(), handle, HANDLE_BYTES)
        error, address = self._runtime.cudaIpcOpenMemHandle(named, self._runtime.cudaIpcMemLazyEnablePeerAccess)
        if error in self._reach_us:
            raise TransferError(f"{self._device} cannot reach the memory of its peer's GPU: {error.name}")
        if error != 0:
            raise PeerGone(f"the memory of a peer's GPU cannot be opened: {error.name}")
        return int(address)

    def close(self, address: int) -> None:
        self._enter()
        (error,) = self._runtime.cudaIpcCloseMemHandle(address)
        if error != 0:
            log.warning("memory of a peer's GPU stays open until this process ends: %s", error.name)

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def read(self, address: int, nbytes: int) -> bytes:
        host = (ctypes.c_char * nbytes)()
        stream = self._stream(batches=False)
        stream.begin([Run(address, ctypes.addressof(host), nbytes)])
        stream.finish()
        return bytes(host)

    def copies(self) -> _Stream:
        return self._stream(batches=self._batches)

    def _stream(self, *, batches: bool) -> _Stream:
        self._enter()
        stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        return _Stream(stream, self._runtime, batches=batches)

    def _enter(self) -> None:
        """Every thread begins on GPU 0."""
        self._runtime.cudaSetDevice(self._device.index or 0)


def open_cuda(device: torch.device) -> Cuda:
    """Raises UserError where there is no such GPU, or nothing to call it by."""
    if device.type != "cuda":
        raise UserError(f"cuda-ipc moves memory of GPUs, not of {device}", hint="write transfer.backend: auto")
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise UserError(
            f"cuda-ipc needs the module cuda.bindings: {error}", hint="pip install cuda-bindings, as torch itself asks"
        ) from error
    try:
        torch.zeros(1, device=device)  # the context that everything below is called in
    except AssertionError as error:  # torch is a build without CUDA
        raise UserError(f"cuda-ipc cannot use {device}: {str(error).splitlines()[0]}") from error
    return _Gpu(device, runtime, driver)
