"""Where a rank's forwards run on its GPU: beside what is done with embeddings that are ready, and not before it."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["DeviceStream"]


class DeviceStream:
    """Used on the compute thread. What ``run`` returns is finished: whoever reads it, on any stream or from outside of
    this process, need not wait. Without a GPU in use it does nothing.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def run(self, work: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return work()
        if self._stream is None:
            torch.cuda.synchronize()  # weights may still be on their way
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            made = work()
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()  # blocking, so without spinning: the threads that preprocess need the core
        for tensor in made:
            if tensor.is_cuda:  # copies on the usual stream may still read it when it is freed
                tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return made
