"""Vision towers of transformers with random weights, at their true size or tiny, made where they will run."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SIZES", "TRUE_SIZE", "qwen2_5_vl_config", "qwen2_5_vl_tower", "qwen3_vl_tower", "whole_model"]

TRUE_SIZE = "7b"

_QWEN2_5 = {
    "7b": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tiny": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 60, "num_heads": 2, "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip
_QWEN3 = {
    "7b": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
    "tiny": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "out_hidden_size": 48,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
SIZES = tuple(_QWEN2_5)


def qwen2_5_vl_config(size: str) -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    return Qwen2_5_VLVisionConfig(patch_size=14, window_size=112, **_QWEN2_5[size])


def qwen2_5_vl_tower(size: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return _made(Qwen2_5_VisionTransformerPretrainedModel, qwen2_5_vl_config(size), device, dtype, attention)


def qwen3_vl_tower(size: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(patch_size=16, **_QWEN3[size])
    return _made(Qwen3VLVisionModel, config, device, dtype, attention)


def whole_model(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Qwen2.5-VL as its family loads it for an encoder: the tower, and no language model."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    vision = {"patch_size": 14, "window_size": 112, **_QWEN2_5[size]}
    text = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=3, video_token_id=4)
    module = _made(Qwen2_5_VLForConditionalGeneration, config, device, dtype, "sdpa")
    module.model.language_model = module.lm_head = None
    return module


def _made(kind: Any, config: Any, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """Made in its format at once: converted later, the frequencies of its rotation would be rounded too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            module = kind(config)
    finally:
        torch.set_default_dtype(before)
    module.config._attn_implementation = attention
    return module.eval().requires_grad_(False)
