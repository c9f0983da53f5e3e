"""The checkpoints we make are what anybody's are: transformers loads them, and their tokens are the same everywhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from epdctl.bench.blueprints import BLUEPRINTS
from epdctl.bench.checkpoints import SIZES, make_checkpoint, model_config
from tests.support.checkpoints import every_family, tiny_checkpoint

TEXT = "Hello, wörld!  It's 12345\n\n<|im_start|>user\nдом<|image_pad|> é日本<|im_end|>"

CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "image"}]},
    {"role": "assistant", "content": "A line."},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]


@every_family
def test_plain_transformers_loads_it_whole(checkpoint: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    family = json.loads((checkpoint / "config.json").read_text())["model_type"]
    assert type(model).__name__ == BLUEPRINTS[family].model
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (
        model.generation_config.eos_token_id
        == json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    )


def test_both_tokenizers_say_the_same_and_lose_nothing(checkpoint: Path) -> None:
    slim, full = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), AutoTokenizer.from_pretrained(checkpoint)
    ids = slim.encode(TEXT).ids
    assert full(TEXT)["input_ids"] == ids
    assert slim.decode(ids, skip_special_tokens=False) == TEXT
    for token in ("<|im_end|>", "<|image_pad|>", "<|vision_start|>"):
        assert len(slim.encode(token).ids) == 1


@pytest.mark.parametrize("add_vision_id", [False, True])
def test_the_template_reads_the_same_with_and_without_transformers(add_vision_id: bool, checkpoint: Path) -> None:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string(
        (checkpoint / "chat_template.jinja").read_text()
    )
    ours = template.render(messages=CONVERSATION, add_generation_prompt=True, add_vision_id=add_vision_id)
    theirs = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True, add_vision_id=add_vision_id
    )
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    first, second = ("Picture 1: ", "Picture 2: ") if add_vision_id else ("", "")
    assert (
        ours
        == theirs
        == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{first}{picture}What is it?{second}{picture}<|im_end|>\n"
            "<|im_start|>assistant\nA line.<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    )


def test_a_system_message_replaces_ours(checkpoint: Path) -> None:
    template = jinja2.Template((checkpoint / "chat_template.jinja").read_text())
    said = template.render(messages=[{"role": "system", "content": "Be brief."}, *CONVERSATION])
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "helpful" not in said


def test_the_seed_decides_the_weights(
    checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    same, other = make_checkpoint(tmp_path / "same"), tiny_checkpoint(tmp_path_factory, seed=1)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (same / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights
    assert tiny_checkpoint(tmp_path_factory) == checkpoint


def test_each_of_the_halves_is_above_300_mb() -> None:
    ids = {"<|image_pad|>": 1, "<|video_pad|>": 2, "<|vision_start|>": 3, "<|vision_end|>": 4}
    config = Qwen2_5_VLConfig(**model_config(SIZES["halves"], ids | {"<|endoftext|>": 0, "<|im_end|>": 5}))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    tower = sum(math.prod(each.shape) for each in model.model.visual.parameters())
    whole = sum(math.prod(each.shape) for each in model.parameters())
    assert 4 * tower > 300e6
    assert 4 * (whole - tower) > 300e6


def test_the_command_makes_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epdctl.bench.checkpoints", str(tmp_path / "made"), "--seed", "3"]
    command += ["--family", "qwen3_vl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str(tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").stat().st_size < 4 << 20
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == "qwen3_vl"
