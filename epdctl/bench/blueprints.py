"""What each family's random checkpoints are made of: shapes, tokens, chat template, configs. No torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BLUEPRINTS",
    "END_TOKENS",
    "SIZES",
    "SPECIAL_TOKENS",
    "Blueprint",
    "CheckpointSize",
    "model_config",
]

SPECIAL_TOKENS = (  # of the Qwen families
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


_TEXT_TOKENS = SPECIAL_TOKENS[:3]
_LLAVA_TOKENS = (*_TEXT_TOKENS, "<image>", "<video>")
_AUDIO_TOKENS = (*_TEXT_TOKENS, "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")

_SYSTEM = """\
{%- if messages and messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
"""
_QWEN = """\
{%- set pictures = namespace(seen=0) -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{%- set pictures.seen = pictures.seen + 1 -%}
{%- if add_vision_id %}Picture {{ pictures.seen }}: {% endif -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type in ('video', 'video_url') or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
# As the published ones: a message's pictures before its words, and no thought of a content that is a plain string.
_LLAVA = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + ' ' }}
{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}<image>{%- endfor -%}
{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{ '\n' + part.text }}{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
# As the published one, which looks for a part's address and not at its type, and counts the clips.
_AUDIO = """\
{%- set clips = namespace(heard=0) -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if 'audio' in part or 'audio_url' in part -%}
{%- set clips.heard = clips.heard + 1 -%}
Audio {{ clips.heard }}: <|audio_bos|><|AUDIO|><|audio_eos|>
{% elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """Shapes of both halves; heads are 16 wide in the small one, 128 (80 in the tower) in the large ones."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    window: int  # pixels
    dtype: str = "float32"
    max_pixels: int | None = None  # of a picture of the Qwen families; None: the blueprint's, which is small

    @property
    def full_attention(self) -> list[int]:
        """Layers of a windowed tower that see the whole picture: each eighth, as in the real models, or the last."""
        return [*range(7, self.vision_layers, 8)] or [self.vision_layers - 1]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mrope_section(self) -> list[int]:
        """How the angles of a head are shared between time, height and width: as in the real models, 2 : 3 : 3."""
        half = self.head_dim // 2
        side = 3 * half // 8
        return [half - 2 * side, side, side]

    @property
    def interleaved_section(self) -> list[int]:
        """Where the three take turns, height and width have an equal number of turns and time the rest: 6 : 5 : 5."""
        half = self.head_dim // 2
        side = 5 * half // 16
        return [half - 2 * side, side, side]


SIZES = {
    # a few MB: tests and the demo
    "tiny": CheckpointSize(1024, 64, 128, 3, 4, 2, 32, 64, 2, 2, 56),
    # each half above 300 MB of float32: who loads what shows in resident memory
    "halves": CheckpointSize(1024, 2048, 5632, 2, 16, 4, 1280, 3420, 4, 16, 112),
    # Qwen2.5-VL-7B's true size, 16.6 GB: make it on a GPU
    "7b": CheckpointSize(152064, 3584, 18944, 28, 28, 4, 1280, 3420, 32, 16, 112, "bfloat16", 28 * 28 * 1280),
}


@dataclass(frozen=True, slots=True)
class Blueprint:
    """``config`` and ``processor`` give config.json and preprocessor_config.json. The classes are transformers'."""

    model: str
    config_class: str
    processor_class: str
    special_tokens: tuple[str, ...]
    template: str
    config: Callable[[CheckpointSize, Mapping[str, int]], dict[str, Any]]
    processor: Callable[[], dict[str, Any]]
    processing: Callable[[], dict[str, Any]] = dict  # processor_config.json, where there is one


def model_config(size: CheckpointSize, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of Qwen2.5-VL, given the special tokens' ids."""
    return _qwen_tokens(ids) | {
        "text_config": _text(size, ids) | {"rope_parameters": _rope(mrope_section=size.mrope_section)},
        "vision_config": {
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "window_size": size.window,
            "fullatt_block_indexes": size.full_attention,
            "out_hidden_size": size.hidden,
        },
    }


def _qwen3_config(size: CheckpointSize, ids: Mapping[str, int]) -> dict[str, Any]:
    """As Qwen2.5-VL's, but for the patches, the learned positions and DeepStack after every layer but the last."""
    rope = _rope(mrope_section=size.interleaved_section, mrope_interleaved=True)
    return _qwen_tokens(ids) | {
        "text_config": _text(size, ids) | {"rope_parameters": rope, "head_dim": size.head_dim},
        "vision_config": {
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [*range(size.vision_layers)],
            "out_hidden_size": size.hidden,
        },
    }


def _llava_config(size: CheckpointSize, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": _pinpoints(),
        "tie_word_embeddings": False,
        "text_config": _text(size, ids) | {"model_type": "qwen2", "rope_parameters": _rope()},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": size.vision_hidden,
            "image_size": _TILE,
            "intermediate_size": size.vision_intermediate,
            "num_attention_heads": size.vision_heads,
            "num_hidden_layers": size.vision_layers,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def _audio_config(size: CheckpointSize, ids: Mapping[str, int]) -> dict[str, Any]:
    """Its tower has the vision tower's shapes."""
    return {
        "audio_token_index": ids["<|AUDIO|>"],
        "tie_word_embeddings": False,
        "text_config": _text(size, ids) | {"model_type": "qwen2", "rope_parameters": _rope()},
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "d_model": size.vision_hidden,
            "encoder_attention_heads": size.vision_heads,
            "encoder_ffn_dim": size.vision_intermediate,
            "encoder_layers": size.vision_layers,
            "max_source_positions": _HEARD * _SECOND // 2,
            "num_mel_bins": _BANDS,
        },
    }


def _qwen_tokens(ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _text(size: CheckpointSize, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 32768,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6, **more}


def _qwen_processor() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 256,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _qwen3_processor() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 256},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


_TILE = 56  # pixels


def _pinpoints() -> list[list[int]]:
    """Up to four tiles by four: the largest are scaled down after the tower, as in the published models."""
    return [[_TILE * rows, _TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]


def _llava_processor() -> dict[str, Any]:
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": _pinpoints(),
        "size": {"height": _TILE, "width": _TILE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _llava_processing() -> dict[str, Any]:
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": (_TILE // 14) ** 2,
        "vision_feature_select_strategy": "full",
    }


_HEARD = 4  # seconds; the published model hears 30
_SECOND = 100  # frames
_BANDS = 32


def _audio_processor() -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "chunk_length": _HEARD,
        "feature_size": _BANDS,
        "hop_length": 160,
        "n_fft": 400,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 160 * _SECOND,
    }


BLUEPRINTS: Mapping[str, Blueprint] = {
    "qwen2_5_vl": Blueprint(
        model="Qwen2_5_VLForConditionalGeneration",
        config_class="Qwen2_5_VLConfig",
        processor_class="Qwen2_5_VLProcessor",
        special_tokens=SPECIAL_TOKENS,
        template=_SYSTEM + _QWEN,
        config=model_config,
        processor=_qwen_processor,
    ),
    "qwen3_vl": Blueprint(
        model="Qwen3VLForConditionalGeneration",
        config_class="Qwen3VLConfig",
        processor_class="Qwen3VLProcessor",
        special_tokens=SPECIAL_TOKENS,
        template=_QWEN,
        config=_qwen3_config,
        processor=_qwen3_processor,
    ),
    "qwen2_audio": Blueprint(
        model="Qwen2AudioForConditionalGeneration",
        config_class="Qwen2AudioConfig",
        processor_class="Qwen2AudioProcessor",
        special_tokens=_AUDIO_TOKENS,
        template=_SYSTEM + _AUDIO,
        config=_audio_config,
        processor=_audio_processor,
    ),
    "llava_onevision": Blueprint(
        model="LlavaOnevisionForConditionalGeneration",
        config_class="LlavaOnevisionConfig",
        processor_class="LlavaOnevisionProcessor",
        special_tokens=_LLAVA_TOKENS,
        template=_LLAVA,
        config=_llava_config,
        processor=_llava_processor,
        processing=_llava_processing,
    ),
}
