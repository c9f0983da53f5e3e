"""Makes checkpoints with random weights: ordinary directories that transformers loads, for tests and trials.

As a command: ``python -m epdctl.bench.checkpoints DIRECTORY [--family qwen2_5_vl] [--size tiny] [--seed 0]
[--device cpu]``
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from epdctl.bench.blueprints import (
    BLUEPRINTS,
    END_TOKENS,
    SIZES,
    SPECIAL_TOKENS,
    Blueprint,
    CheckpointSize,
    model_config,
)

__all__ = [
    "END_TOKENS",
    "FAMILY",
    "SIZES",
    "SPECIAL_TOKENS",
    "CheckpointSize",
    "make_checkpoint",
    "model_config",
]

FAMILY = "qwen2_5_vl"  # whose checkpoint is made unless another is asked for

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


def make_checkpoint(
    directory: Path, size: CheckpointSize = SIZES["tiny"], seed: int = 0, *, family: str = FAMILY, device: str = "cpu"
) -> Path:
    """Writes config, weights, tokenizer, processor and chat template into ``directory``; returns it.

    ``device``: where the weights are drawn; another one gives others of the same seed."""
    import torch

    blueprint = BLUEPRINTS[family]
    directory.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(directory, size.vocab, blueprint)
    processor = {"processor_class": blueprint.processor_class, **blueprint.processor()}
    if size.max_pixels is not None and "max_pixels" in processor:
        processor["max_pixels"] = size.max_pixels
    _write_json(directory / "preprocessor_config.json", processor)
    if processing := blueprint.processing():
        _write_json(directory / "processor_config.json", processing)
    (directory / "chat_template.jinja").write_text(blueprint.template, encoding="utf-8")
    _write_model(directory, size, blueprint, ids, torch.Generator(device).manual_seed(seed))
    end = [ids[token] for token in END_TOKENS]
    generation = {"do_sample": False, "eos_token_id": end, "pad_token_id": ids["<|endoftext|>"]}
    _write_json(directory / "generation_config.json", generation)
    return directory


def _write_tokenizer(directory: Path, vocab: int, blueprint: Blueprint) -> dict[str, int]:
    """Byte-level BPE, so that any text has tokens. Returns the special tokens' ids."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(blueprint.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(CORPUS.split())], trainer)
    tokenizer.add_special_tokens(list(blueprint.special_tokens))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(blueprint))
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in blueprint.special_tokens}


def _tokenizer_config(blueprint: Blueprint) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": blueprint.processor_class,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [token for token in blueprint.special_tokens if token != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def _write_model(
    directory: Path, size: CheckpointSize, blueprint: Blueprint, ids: dict[str, int], generator: Any
) -> None:
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = getattr(transformers, blueprint.config_class)(**blueprint.config(size, ids))
    with torch.device("meta"):
        model = getattr(transformers, blueprint.model)(config).to(getattr(torch, size.dtype))
    model = model.to_empty(device=generator.device)
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
        _fill_line(name, parameter, generator)
        return
    inputs = 1 if "embed_tokens" in name else math.prod(parameter.shape[1:])
    parameter.normal_(0.0, _gain(name) / math.sqrt(inputs), generator=generator)


def _fill_line(name: str, parameter: Any, generator: Any) -> None:
    if name.endswith("image_newline"):  # stands among embeddings, and is one
        parameter.normal_(0.0, 1.0, generator=generator)
    elif name.endswith("bias"):
        parameter.normal_(0.0, 0.1, generator=generator)
    else:
        parameter.fill_(2.0 if "q_norm" in name or "k_norm" in name else 1.0)


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
    parser.add_argument("--family", choices=sorted(BLUEPRINTS), default=FAMILY)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    print(make_checkpoint(told.directory, SIZES[told.size], told.seed, family=told.family, device=told.device))


if __name__ == "__main__":
    main()
