"""What a rank with a model does to torch before it loads: its threads and its device. Imports torch when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from epdctl.wire.config import RankConfig

if TYPE_CHECKING:
    import torch

__all__ = ["Cuda", "keep_within", "prepare_device"]


class Cuda(Protocol):
    """What is used of ``torch.cuda`` to bound a process."""

    def get_device_properties(self, device: torch.device, /) -> Any: ...

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device, /) -> None: ...


def prepare_device(config: RankConfig) -> torch.device:
    """Bound torch's CPU threads to the plan's, and return the device of this rank, made current."""
    import torch

    torch.set_num_threads(config.threads)
    if not config.devices:
        return torch.device("cpu")
    device = torch.device("cuda", config.devices[0])
    torch.cuda.set_device(device)
    keep_within(torch.cuda, device, config.memory_bytes)
    # It plans anew for every length of keys, and each token of an answer makes one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Float32 is float32: in 19 bits a picture's patches would come out by which pictures share its batch.
    torch.backends.cudnn.allow_tf32 = False
    return device


def keep_within(cuda: Cuda, device: torch.device, memory_bytes: int) -> None:
    """From here on torch raises where it would take more: a rank that outgrows its share must not starve another."""
    if memory_bytes:
        total = int(cuda.get_device_properties(device).total_memory)
        cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total), device)
