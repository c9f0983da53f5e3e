"""Qwen3-VL without torch: its pictures are cut as Qwen2.5-VL's, into the larger patches that its checkpoint names."""

from __future__ import annotations

from epdctl.families.media import PictureFamily
from epdctl.families.qwen2_5_vl import Qwen25VL
from epdctl.ids import Modality

__all__ = ["Qwen3VL"]


class Qwen3VL(Qwen25VL):
    """Implements families.base.Family. DeepStack makes a row wider, not the rows more: no token is added."""

    placeholders = PictureFamily.placeholders

    def obstacle(self, modality: Modality) -> str | None:
        if modality is not Modality.VIDEO:
            return None
        return "Qwen3-VL's videos, with the time as words between their frames, are not served: send frames as pictures"
