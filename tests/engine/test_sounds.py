"""Qwen2-Audio: token for token what ``generate`` answers, and sound of every kind as transformers hears it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

from epdctl.engine.api import LanguageModel, Tower
from epdctl.engine.loading import load_language, load_tower
from epdctl.errors import LoadError, RequestError
from tests.engine.harness import Case, Recorder, Run, ask, media_item, question, untied
from tests.support.checkpoints import model_config
from tests.support.reference import own_processor
from tests.support.sounds import as_file, heard, noise, sound_bytes

pytestmark = pytest.mark.parametrize("checkpoint", ["qwen2_audio"], indirect=True, scope="session")

CPU = torch.device("cpu")
SECONDS = [1.0, 0.021, 3.37, 6.0, 0.05, 2.225]  # one is longer than the tiny model hears, one makes a single row


def no_clip(seed: int) -> Case:
    return Case((f"What did you hear, and how many of them? Number {seed}.",), 24)


def one_clip(seed: int) -> Case:
    return Case((sound_bytes(seed, 1.3), "What is that sound?"), 24)


def beyond_what_is_heard(seed: int) -> Case:
    return Case((sound_bytes(seed, 5.5), "What is that long sound?"), 24)


def a_single_row(seed: int) -> Case:
    """And another clip beside it: transformers' own ``generate`` fails where no clip of a prompt has two rows."""
    return Case((sound_bytes(seed, 0.03), "And that?", sound_bytes(seed + 1, 0.6)), 16)


def three_between_text(seed: int) -> Case:
    first, second, third = (sound_bytes(seed + 50 * n, seconds) for n, seconds in enumerate((0.8, 2.1, 1.49)))
    return Case(("The first is ", first, " and then comes ", second, third, ". Which is louder?"), 24)


def eight_clips(seed: int) -> Case:
    clips = [sound_bytes(100 * seed + n, 0.3 + 0.17 * n) for n in range(8)]
    return Case((*clips, "Describe the difference between these sounds."), 16)


CASES = [no_clip, one_clip, beyond_what_is_heard, a_single_row, three_between_text, eight_clips]


@pytest.mark.parametrize("build", CASES)
def test_the_answer_is_that_of_generate(
    build: Callable[[int], Case], checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    asked = question(build, checkpoint, tower)
    assert ask(language, asked) == asked.reference.answer


@pytest.mark.parametrize("chunk_tokens", [1, 7, 33])
def test_a_clip_longer_than_a_chunk_is_answered_the_same(
    chunk_tokens: int, checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    asked = question(three_between_text, checkpoint, tower)
    assert max(item.rows for item in asked.items) > chunk_tokens
    assert ask(language, asked, chunk_tokens=chunk_tokens) == asked.reference.answer


def test_logits_are_within_a_ten_thousandth(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = question(three_between_text, checkpoint, tower)
    recorder = Recorder(language)
    assert ask(recorder, asked, chunk_tokens=50) == asked.reference.answer
    logits = torch.cat([rows for rows in recorder.logits if len(rows)])
    assert float((logits - asked.reference.logits).abs().max()) < 1e-4


def test_a_changed_clip_and_a_changed_order_change_the_answer(checkpoint: Path) -> None:
    first, second, other = (sound_bytes(seed, 1.2) for seed in (1, 2, 3))

    def answer(one: bytes, two: bytes) -> list[int]:
        _, reference = untied(lambda seed: Case((one, two, f"What is this? {seed}"), 12), checkpoint)
        return reference.answer

    base = answer(first, second)
    assert answer(other, second) != base
    assert answer(first, other) != base
    assert answer(second, first) != base


def test_six_at_once(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = {build.__name__: question(build, checkpoint, tower) for build in CASES}
    run = Run.make(language, chunk_tokens=48, max_batch=4)
    for name, each in asked.items():
        run.admit(name, each)
        run.step()
    run.finish()
    assert run.answers == {name: each.reference.answer for name, each in asked.items()}


# -- the tower --


def whole_models(checkpoint: Path, files: Sequence[bytes]) -> list[torch.Tensor]:
    """[rows, width] for each clip, as the undivided model puts them between the tokens."""
    whole: Any = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = own_processor(checkpoint)
    seen: dict[str, torch.Tensor] = {}
    whole.model.language_model.register_forward_pre_hook(lambda _, __, named: seen.update(named), with_kwargs=True)
    text = processor.audio_token + "x"  # so that one clip's rows do not touch another's
    inputs = processor(
        text=[text * len(files)], audio=[heard(file) for file in files], sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        whole(**inputs)
    places = inputs["input_ids"][0] == whole.config.audio_token_id
    counts = (places & ~places.roll(1)).nonzero().flatten().tolist(), (places & ~places.roll(-1)).nonzero().flatten()
    return [seen["inputs_embeds"][0, start : end + 1] for start, end in zip(counts[0], counts[1].tolist(), strict=True)]


def test_packed_clips_get_what_the_whole_model_gives_them(checkpoint: Path, tower: Tower) -> None:
    files = [sound_bytes(seed, seconds) for seed, seconds in enumerate(SECONDS)]
    batch = [tower.prepare(file, media_item(checkpoint, file, n, len(files))) for n, file in enumerate(files)]
    found = tower.encode(batch)
    assert [tuple(each.shape) for each in found] == [(each.rows, tower.width) for each in batch]
    for one, other in zip(found, whole_models(checkpoint, files), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        assert float(one.std()) > 0.1
    for each, rows in zip(batch, found, strict=True):
        torch.testing.assert_close(tower.encode([each])[0], rows, atol=2e-5, rtol=1e-5)


def test_silence_beyond_the_sound_costs_nothing(checkpoint: Path, tower: Tower) -> None:
    file = sound_bytes(1, 0.5)
    prepared = tower.prepare(memoryview(file), media_item(checkpoint, file, 0, 1))
    assert (prepared.patches, prepared.pixels.shape) == (25, (32, 51))


def features(checkpoint: Path, file: bytes) -> torch.Tensor:
    """[bands, frames] as transformers makes them of what librosa would load."""
    extractor = own_processor(checkpoint).feature_extractor
    found: torch.Tensor = extractor(heard(file), sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    return found


KINDS: dict[str, Callable[[], bytes]] = {
    **{
        f"{kind} {subtype} {rate} Hz, {channels} channels": lambda k=kind, s=subtype, r=rate, c=channels: as_file(  # type: ignore[misc]
            noise(5, 1.7, r, c), r, k, s
        )
        for kind, subtype, rate, channels in (
            ("WAV", "PCM_U8", 8_000, 1),
            ("WAV", "PCM_16", 16_000, 2),
            ("WAV", "PCM_24", 44_100, 2),
            ("WAV", "PCM_32", 22_050, 1),
            ("WAV", "FLOAT", 48_000, 1),
            ("WAV", "DOUBLE", 96_000, 6),
            ("FLAC", "PCM_16", 11_025, 2),
            ("OGG", "VORBIS", 44_100, 1),
            ("OGG", "OPUS", 48_000, 2),
            ("MP3", "MPEG_LAYER_III", 44_100, 2),
        )
    },
    "longer than is heard": lambda: as_file(noise(6, 9.0, 44_100), 44_100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_heard_as_transformers_hears_it(kind: str, checkpoint: Path, tower: Tower) -> None:
    file = KINDS[kind]()
    prepared = tower.prepare(file, media_item(checkpoint, file, 0, 1))
    due = features(checkpoint, file)[:, : prepared.pixels.shape[1]]
    torch.testing.assert_close(prepared.pixels, due, atol=1e-5, rtol=1e-5)
    assert float(prepared.pixels.std()) > 0.05


GOOD = as_file(noise(7, 1.0, 44_100), 44_100, "FLAC")


def without_numbers() -> bytes:
    samples = noise(7, 1.0, 44_100)
    samples[5000] = np.nan
    return as_file(samples, 44_100, subtype="FLOAT")


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a sound clip"),
    "text": (b"this is no sound", "not a sound clip"),
    "cut short": (GOOD[: len(GOOD) // 2], "damaged"),
    "an MP3 cut short": (as_file(noise(7, 1.0, 44_100), 44_100, "MP3")[:4000], "it ends after"),
    "bad middle": (GOOD[:9000] + bytes(4000) + GOOD[13000:], "damaged"),
    "no numbers": (without_numbers(), "samples that are no numbers"),
    "longer than was said": (as_file(noise(7, 1.3, 44_100), 44_100), "was sized for"),
    "of another rate": (as_file(noise(7, 1.0, 44_100), 22_050), "was sized for"),
}


def test_an_mp3_that_counts_its_frames_one_off_is_heard(checkpoint: Path, tower: Tower) -> None:
    file = as_file(noise(7, 1.0, 44_100), 44_100, "MP3")
    frames = int.from_bytes(file[(at := _frames_at(file)) : at + 4], "big")
    for said in (frames + 1, frames - 1):
        changed = file[:at] + said.to_bytes(4, "big") + file[at + 4 :]
        prepared = tower.prepare(changed, media_item(checkpoint, changed, 0, 1))
        torch.testing.assert_close(prepared.pixels[:, :90], features(checkpoint, file)[:, :90], atol=1e-3, rtol=1e-3)


def _frames_at(file: bytes) -> int:
    """Where an MP3's first frame says how many there are."""
    tag = max(file[:64].find(name) for name in (b"Xing", b"Info"))
    assert tag > 0
    return tag + 8


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_clips_are_a_400(kind: str, checkpoint: Path, tower: Tower) -> None:
    data, words = BROKEN[kind]
    with pytest.raises(RequestError, match=words) as caught:
        tower.prepare(data, media_item(checkpoint, GOOD, 3, 4))
    assert (caught.value.status, caught.value.code) == (400, "invalid_audio")


def test_rows_that_the_clip_does_not_make_are_a_400(checkpoint: Path, tower: Tower) -> None:
    item = media_item(checkpoint, GOOD, 0, 1)
    with pytest.raises(RequestError, match="was sized for"):
        tower.prepare(GOOD, structs.replace(item, rows=item.rows + 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("attention", "dtype", "near"), [("varlen", "bfloat16", 0.3), ("sdpa", "float32", 1e-3)])
def test_on_a_gpu_the_tower_gives_the_same(
    attention: str, dtype: str, near: float, checkpoint: Path, tower: Tower
) -> None:
    there = load_tower(model_config(checkpoint, attention=attention, dtype=dtype), torch.device("cuda"))
    files = [sound_bytes(seed, seconds) for seed, seconds in enumerate(SECONDS)]
    items = [media_item(checkpoint, file, n, len(files)) for n, file in enumerate(files)]
    found = there.encode([there.prepare(file, item) for file, item in zip(files, items, strict=True)])
    due = tower.encode([tower.prepare(file, item) for file, item in zip(files, items, strict=True)])
    for one, other in zip(found, due, strict=True):
        assert float((one.float().cpu() - other).abs().max()) < near


# -- loading --


def test_the_halves_hold_the_whole_model_once_and_bit_for_bit(
    checkpoint: Path, tower: Any, language: LanguageModel
) -> None:
    whole = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    left, right = tower.module.state_dict(), language.module.state_dict()  # type: ignore[attr-defined]
    assert all(name.startswith(("model.audio_tower.", "model.multi_modal_projector.")) for name in left)
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in right)
    assert set(left) | set(right) == set(whole)
    assert not set(left) & set(right)
    for name, value in (left | right).items():
        assert torch.equal(value, whole[name]), name


def test_names_of_old_and_new_checkpoints_load_the_same(checkpoint: Path, tmp_path: Path, tower: Any) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"audio_tower", "language_model", "multi_modal_projector"}

    def spelled_out(name: str) -> str:
        name = name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"
        return name.replace("model.language_model.model.", "model.language_model.")

    shutil.copytree(checkpoint, tmp_path / "new")
    new = {spelled_out(name): value for name, value in weights.items()}
    save_file(new, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    again: Any = load_tower(model_config(tmp_path / "new"), CPU)
    for name, value in tower.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name
    load_language(model_config(tmp_path / "new"), CPU)


@pytest.mark.parametrize("name", ["audio_tower.embed_positions.weight", "multi_modal_projector.linear.bias"])
def test_a_tower_that_is_not_wholly_there_does_not_start(name: str, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "torn")
    weights = load_file(checkpoint / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "torn" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=f"lacks 1 parameters: .*{name}"):
        load_tower(model_config(tmp_path / "torn"), CPU)
    load_language(model_config(tmp_path / "torn"), CPU)


def test_a_feature_extractor_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "mixed")
    file = tmp_path / "mixed" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chunk_length": 30}))
    with pytest.raises(LoadError, match="makes 3000 frames of a clip, and its tower takes 400"):
        load_tower(model_config(tmp_path / "mixed"), CPU)
