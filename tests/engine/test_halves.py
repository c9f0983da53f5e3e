"""Each half loads what is its own, all of it, and nothing else; what is not wholly there does not start."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from epdctl.engine.api import LanguageModel, Tower
from epdctl.engine.core import build_engine
from epdctl.engine.loading import load_language, load_tower
from epdctl.errors import LoadError
from epdctl.topology.weights import read_weights
from epdctl.wire.config import EngineConfig
from tests.support.checkpoints import every_family, model_config

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def changed(checkpoint: Path, directory: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of the checkpoint with other weights."""
    copy = directory / "changed"
    shutil.copytree(checkpoint, copy)
    save_file(change(load_file(checkpoint / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    return copy


def without(name: str) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        (found,) = [key for key in weights if key.endswith(name)]
        return {key: value for key, value in weights.items() if key != found}

    return change


def state(half: Any) -> Weights:
    found: Weights = half.module.state_dict()
    return found


def parameters(half: Any) -> int:
    return sum(each.numel() for each in half.module.parameters())


TOWERS = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")


@every_family
def test_the_halves_hold_the_whole_model_once_and_bit_for_bit(
    checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    left, right = state(tower), state(language)
    assert all(name.startswith(TOWERS) for name in left)
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in right)
    assert not set(left) & set(right)
    assert set(left) | set(right) == set(whole)
    for name, value in (left | right).items():
        assert torch.equal(value, whole[name]), name


def test_names_of_old_and_new_checkpoints_load_the_same(checkpoint: Path, tmp_path: Path, tower: Tower) -> None:
    """Both are about: the hub's files say ``visual.…`` and ``model.layers.…``, newer ones spell the path out."""
    old = load_file(checkpoint / "model.safetensors")
    assert {name.partition(".")[0] for name in old} == {"visual", "model", "lm_head"}

    def spelled_out(weights: Weights) -> Weights:
        def name_of(name: str) -> str:
            if name.startswith("visual."):
                return f"model.{name}"
            return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

        return {name_of(name): value for name, value in weights.items()}

    copy = changed(checkpoint, tmp_path, spelled_out)
    again = state(load_tower(model_config(copy), CPU))
    assert all(torch.equal(value, again[name]) for name, value in state(tower).items())
    load_language(model_config(copy), CPU)


def test_the_embeddings_of_a_tied_checkpoint_are_its_head(checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, without("lm_head.weight"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    module: Any = load_language(model_config(copy), CPU)
    assert torch.equal(module.module.lm_head.weight, module.module.get_input_embeddings().weight)
    load_tower(model_config(copy), CPU)


LOADERS: list[tuple[Callable[..., object], str]] = [
    (load_tower, "blocks.1.mlp.up_proj.weight"),
    (load_tower, "merger.ln_q.weight"),
    (load_language, "layers.1.self_attn.k_proj.bias"),
    (load_language, "embed_tokens.weight"),
    (load_language, "lm_head.weight"),
]


THEIR_OWN: list[tuple[str, Callable[..., object], str]] = [
    ("qwen3_vl", load_tower, "deepstack_merger_list.1.linear_fc1.weight"),
    ("qwen3_vl", load_tower, "visual.pos_embed.weight"),
    ("qwen3_vl", load_language, "layers.1.self_attn.q_norm.weight"),
    ("llava_onevision", load_tower, "image_newline"),
    ("llava_onevision", load_tower, "multi_modal_projector.linear_1.bias"),
    ("llava_onevision", load_tower, "embeddings.position_embedding.weight"),
    ("llava_onevision", load_language, "embed_tokens.weight"),
    ("llava_onevision", load_language, "lm_head.weight"),
]


@pytest.mark.parametrize(("checkpoint", "load", "name"), THEIR_OWN, indirect=["checkpoint"], scope="session")
def test_what_only_one_family_has_is_named_and_refused_too(
    load: Callable[..., object], name: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=rf"lacks 1 parameters: \S*{name}"):
        load(model_config(changed(checkpoint, tmp_path, without(name))), CPU)


@pytest.mark.parametrize(("load", "name"), LOADERS)
def test_a_missing_parameter_is_named_and_refused(
    load: Callable[..., object], name: str, checkpoint: Path, tmp_path: Path
) -> None:
    copy = changed(checkpoint, tmp_path, without(name))
    with pytest.raises(LoadError, match=rf"lacks 1 parameters: \S*{name}"):
        load(model_config(copy), CPU)


@pytest.mark.parametrize(("load", "name"), LOADERS[1:4:2] + LOADERS[-1:])
def test_a_parameter_of_another_shape_is_named_and_refused(
    load: Callable[..., object], name: str, checkpoint: Path, tmp_path: Path
) -> None:
    def longer(weights: Weights) -> Weights:
        return {key: torch.cat([value, value]) if key.endswith(name) else value for key, value in weights.items()}

    with pytest.raises(LoadError, match=rf"wrong shape: \S*{name}"):
        load(model_config(changed(checkpoint, tmp_path, longer)), CPU)


def test_what_the_other_half_lacks_is_its_own_affair(checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, without("blocks.1.mlp.up_proj.weight"))
    load_language(model_config(copy), CPU)


def test_a_parameter_that_nobody_reads_is_mentioned(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = changed(checkpoint, tmp_path, lambda weights: weights | {"surprise.weight": torch.zeros(1)})
    with caplog.at_level(logging.WARNING):
        load_tower(model_config(copy), CPU)
    assert "surprise.weight" in caplog.text
    assert "layers" not in caplog.text


def no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()


def torn_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def garbage(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not at all")


def odd_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")


def nothing(copy: Path) -> None:
    shutil.rmtree(copy)


@pytest.mark.parametrize("spoil", [no_weights, torn_weights, garbage, odd_config, nothing])
@pytest.mark.parametrize("load", [load_tower, load_language])
def test_a_broken_checkpoint_is_one_error_that_names_the_directory(
    spoil: Callable[[Path], None], load: Callable[..., object], checkpoint: Path, tmp_path: Path
) -> None:
    copy = changed(checkpoint, tmp_path, lambda weights: weights)
    spoil(copy)
    with pytest.raises(LoadError, match=str(copy)):
        load(model_config(copy), CPU)


def test_a_tower_without_its_processor_does_not_start(checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, lambda weights: weights)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(LoadError, match=r"preprocessor_config\.json"):
        load_tower(model_config(copy), CPU)


@pytest.mark.parametrize(
    ("load", "changes", "said"),
    [
        (load_tower, {"family": "llama"}, "no model family 'llama'"),
        (load_tower, {"dtype": "float99"}, "no number format"),
        (load_language, {"dtype": "int8"}, "no number format"),
        (load_tower, {"image_processor": "magick"}, "no image processor"),
        (load_tower, {"attention": "magic"}, "no attention"),
        (load_tower, {"attention": "varlen"}, "needs a GPU"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(
    load: Callable[..., object], changes: dict[str, str], said: str, checkpoint: Path
) -> None:
    with pytest.raises(LoadError, match=said):
        load(model_config(checkpoint, **changes), CPU)


def test_sliding_windows_are_refused_rather_than_ignored(checkpoint: Path, tmp_path: Path) -> None:
    copy = changed(checkpoint, tmp_path, lambda weights: weights)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config["text_config"].pop("layer_types", None)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="sliding-window"):
        load_language(model_config(copy), CPU)


def test_an_engine_is_built_in_phases_one_can_watch(checkpoint: Path) -> None:
    said: list[tuple[str, int, int]] = []
    engine = build_engine(model_config(checkpoint), EngineConfig(kv_tokens=256), CPU, lambda *phase: said.append(phase))
    assert [phase for phase, done, total in said if done == total] == ["imports", "weights", "pools"]
    assert engine.kv.pages == 16
    assert not engine.has_work
    assert (engine.kv.layout.layers, engine.kv.layout.kv_heads, engine.kv.layout.dtype) == (3, 2, "float32")


@every_family
def test_sizes_read_from_headers_are_those_of_what_is_loaded(
    checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    """The plan reckons with the former, without torch."""
    sizes = read_weights(checkpoint)
    assert sizes is not None
    assert (sizes.row, sizes.row) == (tower.width, language.row_width)
    assert sizes.kv * 4 * 16 == language.layout(16).page_bytes
    assert (sizes.tower, sizes.language) == (parameters(tower), parameters(language))


def test_half_precision_loads_both_halves(checkpoint: Path) -> None:
    config = model_config(checkpoint, dtype="bfloat16")
    assert load_tower(config, CPU).dtype is torch.bfloat16
    assert load_language(config, CPU).layout(16).dtype == "bfloat16"
