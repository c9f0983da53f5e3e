"""What a rank with a model does to torch before it loads: its threads and its device. Imports torch when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epdctl.wire.config import RankConfig

if TYPE_CHECKING:
    import torch

__all__ = ["prepare_device"]


def prepare_device(config: RankConfig) -> torch.device:
    """Bound torch's CPU threads to the plan's, and return the device of this rank, made current."""
    import torch

    torch.set_num_threads(config.threads)
    if not config.devices:
        return torch.device("cpu")
    device = torch.device("cuda", config.devices[0])
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # it plans anew for every length of keys: each token of an answer has one
    return device
