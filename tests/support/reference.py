"""What transformers' own ``generate`` answers, greedy, in float32: the truth that every other way is held against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

__all__ = ["SMALLEST_GAP", "Reference", "Tied", "picture_bytes", "reference_generate"]

SMALLEST_GAP = 1e-3  # below it a difference in rounding may turn an answer: the case says nothing


class Tied(AssertionError):
    """The two best logits came too near each other: take another seed."""


@dataclass(frozen=True)
class Reference:
    prompt: list[int]
    answer: list[int]  # with the end token, if it came to one
    logits: torch.Tensor  # [answer, vocab]
    gap: float
    text: str


def picture_bytes(seed: int, width: int, height: int, kind: str = "PNG") -> bytes:
    """A patchwork of colours, as a file."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((width, height)).save(file, kind)
    return file.getvalue()


def reference_generate(
    directory: Path, messages: Sequence[dict[str, Any]], pictures: Sequence[bytes], max_new_tokens: int
) -> Reference:
    """``messages``: chat messages with a part ``{"type": "image"}`` per picture. Raises Tied."""
    model, tokenizer, processor = _loaded(directory)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    seen: dict[str, Any] = {}
    for file in pictures:
        one = processor(images=[Image.open(io.BytesIO(file)).convert("RGB")], return_tensors="pt")
        for key in ("pixel_values", "image_grid_thw"):
            seen[key] = torch.cat([seen[key], one[key]]) if key in seen else one[key]
        text = text.replace("<|image_pad|>", "<|placeholder|>" * (int(one["image_grid_thw"].prod()) // 4), 1)
    prompt = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt")
    output = model.generate(
        **prompt,
        **seen,
        mm_token_type_ids=(prompt["input_ids"] == model.config.image_token_id).int(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return _reference(tokenizer, prompt["input_ids"][0].tolist(), output)


def _reference(tokenizer: Any, prompt: list[int], output: Any) -> Reference:
    logits = torch.stack(output.logits)[:, 0]
    best = logits.topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    if gap < SMALLEST_GAP:
        raise Tied(f"the two best logits come within {gap:.1e}: take another seed for this case")
    answer = output.sequences[0, len(prompt) :].tolist()
    return Reference(prompt, answer, logits, gap, tokenizer.decode(answer, skip_special_tokens=True))


@cache
def _loaded(directory: Path) -> tuple[Any, Any, Any]:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory), Qwen2VLImageProcessorPil.from_pretrained(directory)
