"""Makes Qwen2.5-VL checkpoints with random weights: ordinary directories that transformers loads, for tests and trials.

As a command: ``python -m epdctl.bench.checkpoints DIRECTORY [--size tiny] [--seed 0]``
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SIZES", "CheckpointSize", "make_checkpoint", "model_config"]

SPECIAL_TOKENS = (
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

CHAT_TEMPLATE = """\
{%- set pictures = namespace(seen=0) -%}
{%- if messages and messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
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

# What the byte pairs are learned from: enough common words for answers that look like words.
CORPUS = """
The picture shows a red square beside a blue circle, and a small green triangle stands under both of them. What is in
this picture? How many shapes are there, and which of them is larger? The first picture is darker than the second one,
but the third has more colours. Describe the difference between these pictures in one short sentence, please. There is a
line from the upper left corner to the lower right corner. A person walks along the river while the sun is going down
over the hills. Somebody left a bicycle near the door of the house; nobody knows when it will be taken away again. Yes,
it looks like water, or perhaps like glass. No, there are not seven of them, only five. Where does the light come from?
It comes from the window on the other side of the room. You are a helpful assistant. Answer with a number: 1, 2, 3, 4,
10, 16, 25, 64, 100. Write about white paper, yellow leaves, black stones, warm bread, cold winds, long roads, old
bridges, quiet gardens, bright stars, deep forests, wide fields, narrow streets, open doors and empty chairs.
"""


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """Shapes of both halves; heads are 16 wide in the small one, 128 (80 in the tower) in the large one."""

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

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mrope_section(self) -> list[int]:
        """How the angles of a head are shared between time, height and width: as in the real models, 2 : 3 : 3."""
        half = self.head_dim // 2
        side = 3 * half // 8
        return [half - 2 * side, side, side]


SIZES = {
    # a few MB: tests and the demo
    "tiny": CheckpointSize(1024, 64, 128, 3, 4, 2, 32, 64, 2, 2, 56),
    # each half above 300 MB of float32: who loads what shows in resident memory
    "halves": CheckpointSize(1024, 2048, 5632, 2, 16, 4, 1280, 3420, 4, 16, 112),
}


def make_checkpoint(directory: Path, size: CheckpointSize = SIZES["tiny"], seed: int = 0) -> Path:
    """Writes config, weights, tokenizer, processor and chat template into ``directory``; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(directory, size.vocab)
    _write_json(directory / "preprocessor_config.json", _preprocessor_config())
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_model(directory, size, ids, seed)
    end = [ids[token] for token in END_TOKENS]
    generation = {"do_sample": False, "eos_token_id": end, "pad_token_id": ids["<|endoftext|>"]}
    _write_json(directory / "generation_config.json", generation)
    return directory


def _write_tokenizer(directory: Path, vocab: int) -> dict[str, int]:
    """Byte-level BPE, so that any text has tokens. Returns the special tokens' ids."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(CORPUS.split())], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 256,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def model_config(size: CheckpointSize, ids: dict[str, int]) -> dict[str, Any]:
    """config.json, given the special tokens' ids."""
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": size.mrope_section},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        "vision_config": {
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "window_size": size.window,
            "fullatt_block_indexes": [size.vision_layers - 1],
            "out_hidden_size": size.hidden,
        },
    }


def _write_model(directory: Path, size: CheckpointSize, ids: dict[str, int], seed: int) -> None:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen2_5_VLConfig(**model_config(size, ids))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, generator)
        model.lm_head.weight[_mute(directory, size.vocab)] = 0.0
    model.save_pretrained(directory)


def _mute(directory: Path, vocab: int) -> list[int]:
    """Tokens that an answer must not have: control characters, lone bytes, special tokens but the ends."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ends = {tokenizer.token_to_id(token) for token in END_TOKENS}
    texts = ((token, tokenizer.decode([token])) for token in range(vocab) if token not in ends)
    return [token for token, text in texts if not text.isprintable() or not text or "\ufffd" in text]


def _fill(name: str, parameter: Any, generator: Any) -> None:
    """Wide: a picture, and the order of two, must reach the answer."""
    if parameter.ndim == 1:
        parameter.normal_(0.0, 0.1, generator=generator) if name.endswith("bias") else parameter.fill_(1.0)
        return
    inputs = 1 if "embed_tokens" in name else math.prod(parameter.shape[1:])
    parameter.normal_(0.0, _gain(name) / math.sqrt(inputs), generator=generator)


def _gain(name: str) -> float:
    """How much wider than what keeps the size of values; the first part that fits."""
    return next(gain for part, gain in _GAINS if part in name)


_GAINS = (
    ("embed_tokens", 1.0),
    ("q_proj", 2.0),
    ("k_proj", 2.0),
    ("o_proj", 2.0),
    ("lm_head", 3.0),
    ("", 1.0),
)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.checkpoints", description="Make a checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.directory, SIZES[arguments.size], arguments.seed))


if __name__ == "__main__":
    main()
