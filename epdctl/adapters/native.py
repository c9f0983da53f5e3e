"""The native engine: every rank is one Python process that runs ``epdctl.rank`` with the service of its stage."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping

import msgspec

from epdctl.errors import PlacementError
from epdctl.ids import Stage
from epdctl.topology.plan import PlannedRank
from epdctl.wire.variables import environment

__all__ = ["SERVICES", "NativeAdapter"]

SERVICES: Mapping[Stage, str] = {
    Stage.GATEWAY: "epdctl.gateway.service:GatewayService",
    Stage.ENCODER_ROUTER: "epdctl.encoder.router:RouterService",
    Stage.ENCODER: "epdctl.encoder.worker:EncoderService",
    Stage.PREFILL: "epdctl.prefill.service:PrefillService",
    Stage.DECODE: "epdctl.decode.service:DecodeService",
    Stage.LANGUAGE: "epdctl.decode.language:LanguageService",
    Stage.MONO: "epdctl.mono.service:MonoService",
}

_INHERITED = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
        *("LD_LIBRARY_PATH", "CUDA_HOME", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_VISIBLE_DEVICES"),
        "TRITON_CACHE_DIR",  # compiled kernels; without it under HOME, and kept from one start to the next either way
    }
)
_INHERITED_PREFIXES = ("LC_", "HF_", "PYTHON", "EPDCTL_LOG")
_SECRET = "TOKEN"  # ranks are offline and need none; ``plan`` prints what they get

_FIXED = {
    "OMP_WAIT_POLICY": "passive",  # spinning threads on shared cores cost 7 to 20 times
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # a rank loads what the plan found, and fetches nothing
    "PYTHONUNBUFFERED": "1",
    # Torch's profiler greets in the log at every capture, one level above its errors. Of those that matter, a GPU that
    # it may not read, the merged trace tells.
    "KINETO_LOG_LEVEL": "6",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


class NativeAdapter:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._inherited = {name: value for name, value in environ.items() if _may_inherit(name)}

    def command(self, rank: PlannedRank) -> PlannedRank:
        """Raises PlacementError for a stage that this engine does not serve."""
        service = SERVICES.get(rank.stage)
        if service is None:
            raise PlacementError(f"the native engine serves no stage {rank.stage.value!r}")
        return dataclasses.replace(
            rank,
            config=msgspec.structs.replace(rank.config, service=service),
            argv=(sys.executable, "-m", "epdctl.rank"),
            env=self._environment(rank),
        )

    def _environment(self, rank: PlannedRank) -> dict[str, str]:
        """Everything the process gets. It sees its own GPUs only, and counts them from 0.

        PYTORCH_CUDA_ALLOC_CONF is never passed on: expandable segments cannot be written to by peers.
        """
        threads, transfer = str(rank.config.threads), rank.config.transfer
        moving = environment(transfer.backend, transfer.protocol)
        own = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in rank.gpus),
        }
        return dict(sorted((self._inherited | _FIXED | moving | own).items()))


def _may_inherit(name: str) -> bool:
    return (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and _SECRET not in name
