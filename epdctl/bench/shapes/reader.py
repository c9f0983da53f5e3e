"""A checkpoint on its own, with transformers and nothing of the engine: what it answers to questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from epdctl.bench.shapes.draw import render
from epdctl.bench.shapes.questions import MOST_PICTURES, Question, messages

__all__ = ["Reader"]

LONGEST = 4 * MOST_PICTURES  # tokens of an answer: number, colour and comma for each picture, and the end


class Reader:
    """In float32 on the CPU, greedily."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.processor: Any = Qwen2VLImageProcessorPil.from_pretrained(directory)
        self._image = self.model.config.image_token_id
        self._end = frozenset(self.model.generation_config.eos_token_id)

    def answers(self, questions: Sequence[Question]) -> list[str]:
        return [str(self.tokenizer.decode(tokens)) for tokens in self.tokens(questions)]

    def tokens(self, questions: Sequence[Question]) -> list[list[int]]:
        """Of each answer, without the end token. One batch: the shorter prompts are padded on the left."""
        pictures = [Image.fromarray(render(scene)) for question in questions for scene in question.scenes]
        seen = self.processor(images=pictures, return_tensors="pt")
        inputs = self.tokenizer(self._prompts(questions, seen["image_grid_thw"]), return_tensors="pt", padding=True)
        produced = self.model.generate(
            **inputs,
            **seen,
            mm_token_type_ids=(inputs["input_ids"] == self._image).int(),
            max_new_tokens=LONGEST,
            do_sample=False,
        )
        fresh = produced[:, inputs["input_ids"].shape[1] :]
        return [list(takewhile(lambda token: token not in self._end, answer)) for answer in fresh.tolist()]

    def _prompts(self, questions: Sequence[Question], grids: torch.Tensor) -> list[str]:
        merged = self.processor.merge_size**2
        rows = iter((grids.prod(1) // merged).tolist())
        return [self._prompt(question, [next(rows) for _ in question.scenes]) for question in questions]

    def _prompt(self, question: Question, rows: Sequence[int]) -> str:
        """The template leaves one placeholder for a picture; the model wants one for each row of its embedding."""
        text = self.tokenizer.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)
        pieces = text.split("<|image_pad|>")
        filled = [piece + "<|image_pad|>" * count for piece, count in zip(pieces[:-1], rows, strict=True)]
        return "".join([*filled, pieces[-1]])
