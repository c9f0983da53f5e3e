"""The torch-free half of Qwen2-Audio, held against transformers' own processor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from epdctl.errors import LoadError
from epdctl.families import modalities_of, open_family
from epdctl.families.base import Family, PictureHeader, SoundHeader, Span
from epdctl.families.samples import WAV
from epdctl.families.sounds import header_of
from epdctl.ids import Modality
from tests.support.sounds import as_file, heard

AUDIO = 77
EXTRACTORS: dict[str, dict[str, Any]] = {
    "published": {"feature_size": 128, "chunk_length": 30, "hop_length": 160, "n_fft": 400, "sampling_rate": 16000},
    "defaults": {},
    "short": {"feature_size": 8, "chunk_length": 2},
    "another pace": {"feature_size": 8, "chunk_length": 3, "hop_length": 128, "sampling_rate": 24000},
    "a hop that does not divide": {"feature_size": 8, "chunk_length": 1, "hop_length": 300},
}


def family(directory: Path, extractor: dict[str, Any], *, nested: bool = False) -> Family:
    config = {"model_type": "qwen2_audio", "audio_token_index": AUDIO, "eos_token_id": 5}
    (directory / "config.json").write_text(json.dumps(config))
    name, content = "preprocessor_config.json", extractor
    if nested:
        name, content = "processor_config.json", {"feature_extractor": extractor}
    (directory / name).write_text(json.dumps(content))
    return open_family(directory)


def lengths(count: int, most: int, hop: int) -> list[int]:
    """Seeded; half of them where a frame, a position or a row begins."""
    draw = random.Random(7)
    found = [draw.randint(1, most + most // 4) for _ in range(count // 2)]
    found += [max(1, hop * draw.randint(1, most // hop) + draw.choice([-1, 0, 1])) for _ in range(count // 2)]
    return [*found, most - 1, most, most + 1]


def rows_of(mask: Any) -> list[int]:
    """As transformers' processor counts, from the frames that hold sound."""
    return [(((frames - 1) // 2 + 1) - 2) // 2 + 1 for frames in mask.sum(-1).tolist()]


@pytest.mark.parametrize("name", EXTRACTORS)
def test_rows_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    """Its feature extractor's mask is what it counts; the features themselves, which cost time, are left out."""
    settings = EXTRACTORS[name]
    subject, own = family(tmp_path, settings), WhisperFeatureExtractor(**settings)
    own._torch_extract_fbank_features = lambda waveform, device: np.zeros((len(waveform), 1, 1))
    for count in lengths(400 if own.n_samples < 10**5 else 200, own.n_samples, own.hop_length):
        found = own(np.zeros(count, np.float32), sampling_rate=own.sampling_rate, return_attention_mask=True)
        (due,) = rows_of(found["attention_mask"])
        try:
            rows = subject.span(SoundHeader(count, own.sampling_rate), 1).rows
        except ValueError:
            rows = 0
        assert rows == due, count


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_345, 22_050, 24_000, 44_100, 48_000, 96_000])
def test_a_clip_of_another_rate_is_as_long_as_when_it_was_loaded(rate: int, tmp_path: Path) -> None:
    subject = family(tmp_path, EXTRACTORS["published"])
    draw = random.Random(rate)
    for frames in [draw.randint(rate // 20, rate) for _ in range(20)]:
        loaded = len(heard(as_file(np.zeros(frames, np.float32), rate)))
        assert subject.span(SoundHeader(frames, rate), 1) == subject.span(SoundHeader(loaded, 16_000), 1), frames


def test_what_is_beyond_thirty_seconds_is_not_heard(tmp_path: Path) -> None:
    subject = family(tmp_path, EXTRACTORS["published"])
    assert subject.span(SoundHeader(30 * 16_000, 16_000), 1) == Span((1, 1, 3000), 750, Modality.AUDIO)
    assert subject.span(SoundHeader(500 * 44_100, 44_100), 1).rows == 750


def test_a_clip_that_makes_no_row_is_refused(tmp_path: Path) -> None:
    subject = family(tmp_path, {})
    with pytest.raises(ValueError, match=r"of 20 ms is too short: the model needs more than 20"):
        subject.span(SoundHeader(320, 16_000), 1)
    assert subject.span(SoundHeader(321, 16_000), 1).rows == 1
    assert subject.span(header_of(WAV), 1).rows == 1


def test_a_picture_is_none_of_its(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no pictures"):
        family(tmp_path, {}).span(PictureHeader(32, 32), 1)
    assert modalities_of("qwen2_audio") == (Modality.AUDIO,)


def test_each_placeholder_becomes_its_clip(tmp_path: Path) -> None:
    spans = [Span((1, 1, 9), 2, Modality.AUDIO), Span((1, 1, 12), 3, Modality.AUDIO)]
    prompt = family(tmp_path, {}).expand([1, AUDIO, 2, AUDIO], spans)
    assert prompt.tokens == [1, AUDIO, AUDIO, 2, AUDIO, AUDIO, AUDIO]
    assert [(item.modality, item.offset, item.rows) for item in prompt.items] == [("audio", 1, 2), ("audio", 4, 3)]
    with pytest.raises(ValueError, match="2 places for sound clips, and there are 1"):
        family(tmp_path, {}).expand([1, AUDIO, 2, AUDIO], spans[:1])


def test_settings_in_one_file_for_all_processors(tmp_path: Path) -> None:
    subject = family(tmp_path, EXTRACTORS["short"], nested=True)
    assert subject.span(SoundHeader(10**6, 16_000), 1).rows == 50


def test_a_checkpoint_that_lacks_what_it_takes_is_refused(tmp_path: Path) -> None:
    family(tmp_path, {})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(LoadError, match=r"preprocessor_config\.json is missing"):
        open_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_audio", "eos_token_id": 5}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(LoadError, match="audio_token_id is None"):
        open_family(tmp_path)
