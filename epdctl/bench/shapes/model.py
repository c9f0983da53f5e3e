"""The untrained model: its size, its first weights, and its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from epdctl.bench.checkpoints import END_TOKENS, SPECIAL_TOKENS
from epdctl.bench.shapes.tokens import CHAT_TEMPLATE

__all__ = ["DIRECTORY", "LARGEST", "MEAN", "MERGE", "PATCH", "SMALLEST", "STD", "build", "pack", "weights"]

DIRECTORY = Path(__file__).parents[2] / "data" / "shapes-vl"
PATCH = 8  # pixels
MERGE = 2  # patches, per side, that become one token
SMALLEST, LARGEST = 48 * 48, 80 * 64  # pixels; what is beyond is scaled
MEAN, STD = 0.5, 0.25
WIDTH = 0.08  # of the first weights: with the library's 0.02 nothing is learnt for minutes


def build(tokenizer: Tokenizer, seed: int) -> Any:
    """Qwen2_5_VLForConditionalGeneration with seeded random weights, in float32."""
    torch.manual_seed(seed)
    return _untrained(tokenizer)


def _untrained(tokenizer: Tokenizer) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_config(tokenizer)))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint, by the names that the whole model has for them, in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return dict(model.state_dict())


def pack(directory: Path, tokenizer: Tokenizer, model: Any) -> None:
    """Writes an ordinary checkpoint; the weights are rounded to bfloat16, the model itself stays as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", _tokenizer_config())
    _write(directory / "preprocessor_config.json", _preprocessor_config())
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _save_weights(directory, _untrained(tokenizer), model)
    _write(directory / "generation_config.json", _generation_config(_ids(tokenizer)))


def _save_weights(directory: Path, rounded: Any, model: Any) -> None:
    """Through a second model, whose configuration knows nothing of how the first one is trained."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # the library leaves it to its owner alone


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = _ids(tokenizer)
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "initializer_range": WIDTH,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "out_hidden_size": 128,
            "initializer_range": WIDTH,
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": SMALLEST,
        "max_pixels": LARGEST,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    end = [ids[token] for token in END_TOKENS]
    return {"do_sample": False, "eos_token_id": end, "pad_token_id": ids["<|endoftext|>"]}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
