"""What transformers' own ``generate`` answers, greedy, in float32: the truth that every other way is held against."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, WhisperFeatureExtractor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tests.support.sounds import RATE, heard

__all__ = ["SMALLEST_GAP", "Reference", "Tied", "as_part", "own_processor", "picture_bytes", "reference_generate"]

# Each family's own processor, around its image processor of the PIL kind.
_PROCESSORS = {
    "llava_onevision": (LlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil),
    "qwen3_vl": (Qwen3VLProcessor, Qwen2VLImageProcessorPil),
}

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
    directory: Path, messages: Sequence[dict[str, Any]], media: Sequence[bytes], max_new_tokens: int, **options: Any
) -> Reference:
    """``messages``: chat messages with a part of ``as_part`` per medium. ``options``: of ``generate``. Raises Tied."""
    model, processor = _loaded(directory)
    text = processor.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    prompt = processor(text=[text], **_given(media), return_tensors="pt")
    if "image_grid_thw" in prompt or "video_grid_thw" in prompt:
        tokens, seen = prompt["input_ids"], (model.config.image_token_id, model.config.video_token_id)
        prompt["mm_token_type_ids"] = sum((tokens == token).int() * number for number, token in enumerate(seen, 1))
    output = model.generate(
        **prompt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return _reference(processor.tokenizer, prompt["input_ids"][0].tolist(), output)


def as_part(file: bytes) -> dict[str, Any]:
    """A medium in a message, as templates know it: a sound clip where the file is WAV, a video where it is MP4, else a
    picture."""
    if _is_sound(file):
        return {"type": "audio", "audio_url": ""}
    return {"type": "video" if _is_video(file) else "image"}


def _given(media: Sequence[bytes]) -> dict[str, Any]:
    """To the processor."""
    if any(map(_is_sound, media)):
        return {"audio": [heard(file) for file in media], "sampling_rate": RATE}
    seen = [Image.open(io.BytesIO(file)).convert("RGB") for file in media if not _is_video(file)]
    shown = [_shown(file) for file in media if _is_video(file)]
    videos = {"videos": [frames for frames, _ in shown], "video_metadata": [told for _, told in shown]} if shown else {}
    return {"images": [seen] if seen else None, **videos}


def _shown(file: bytes) -> tuple[torch.Tensor, Any]:
    """The frames that transformers' own reader finds, as its processor for videos chooses them: two of each second."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_utils import read_video_pyav

    frames, told = read_video_pyav(io.BytesIO(file), partial(Qwen2VLVideoProcessor().sample_frames, fps=2))
    return torch.from_numpy(frames).permute(0, 3, 1, 2), told


def _is_video(file: bytes) -> bool:
    return file[4:8] == b"ftyp"


def _is_sound(file: bytes) -> bool:
    return file[:4] == b"RIFF"


def _reference(tokenizer: Any, prompt: list[int], output: Any) -> Reference:
    logits = torch.stack(output.logits)[:, 0]
    best = logits.topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    if gap < SMALLEST_GAP:
        raise Tied(f"the two best logits come within {gap:.1e}: take another seed for this case")
    answer = output.sequences[0, len(prompt) :].tolist()
    return Reference(prompt, answer, logits, gap, tokenizer.decode(answer, skip_special_tokens=True))


@cache
def _loaded(directory: Path) -> tuple[Any, Any]:
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()
    return model, own_processor(directory)


def own_processor(directory: Path) -> Any:
    """transformers' own for this checkpoint; with its video half for Qwen2.5-VL, where torchvision is there for it."""
    family = json.loads((directory / "config.json").read_text())["model_type"]
    if family == "qwen2_audio":
        return _sound_processor(directory)
    whole, images = _PROCESSORS[family]

    class Whole(whole):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    settings = directory / "processor_config.json"
    return Whole(
        images.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        _video_processor(directory) if family == "qwen2_5_vl" else None,
        chat_template=(directory / "chat_template.jinja").read_text(),
        **(json.loads(settings.read_text()) if settings.exists() else {}),
    )


def _video_processor(directory: Path) -> Any:
    if importlib.util.find_spec("torchvision") is None:
        return None
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor.from_pretrained(directory)


def _sound_processor(directory: Path) -> Any:
    return Qwen2AudioProcessor(
        WhisperFeatureExtractor.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
    )
