"""How many tokens a video becomes, without torch: held against transformers' own arithmetic."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from epdctl.families import open_family, videos
from epdctl.families.base import PictureHeader, Span, VideoHeader
from epdctl.families.qwen2_5_vl import VideoRule
from epdctl.ids import Modality

IMAGE, VIDEO = 77, 78
SMALL = {"min_pixels": 3136, "max_pixels": 200704}
CONFIGS: dict[str, dict[str, Any]] = {
    "the processor's own": {},
    "as published": {"min_pixels": 3136, "max_pixels": 12845056},
    "new form": {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 300 * 28 * 28}},
    "few frames": {"fps": 1.5, "min_frames": 6, "max_frames": 21},
    "a budget": {"cap_pixels_per_frame": True, "max_video_tokens": 3000, **SMALL},
}


def checkpoint(directory: Path, family: str = "qwen2_5_vl", **more: object) -> Path:
    config = {"model_type": family, "image_token_id": IMAGE, "video_token_id": VIDEO, "eos_token_id": 5}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(SMALL | more))
    return directory


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "missing", list)


def headers(count: int) -> list[VideoHeader]:
    """Seeded; rates as cameras have them, and two in which most divisions leave something."""
    draw = random.Random(7)
    rates = [10.0, 24.0, 25.0, 30.0, 60.0, 30000 / 1001, 24000 / 1001, 7.3, 119.88]
    return [
        VideoHeader(draw.randint(2, 4000), draw.choice(rates), draw.randint(20, 2000), draw.randint(20, 1200))
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_frames_are_scaled_as_the_processor_scales(name: str) -> None:
    rule = VideoRule.read(CONFIGS[name])
    for header in headers(400):
        frames, scale = rule.shown(header), rule.scaled(rule.shown(header))
        due = smart_resize(
            header.height, header.width, factor=28, min_pixels=scale.min_pixels, max_pixels=scale.max_pixels
        )
        assert rule.grid(header) == (frames // 2, due[0] // 14, due[1] // 14)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_shown_is_there_and_spread_over_the_whole(name: str) -> None:
    """By the processor's formula for the places; how many of them is held against it where it can be imported."""
    rule = VideoRule.read(CONFIGS[name])
    for header in headers(400):
        count = rule.shown(header)
        places = torch.arange(0, header.frames, header.frames / count).int()[:count].tolist()
        assert len(set(places)) == count
        assert places[0] == 0
        assert places[-1] < header.frames
        assert count % 2 == 0
        assert count <= min(rule.most, header.frames)
        due = header.frames / header.rate * rule.rate  # type: ignore[operator]
        assert count in range(int(due) - 1, int(due) + 1) or count in (rule.most, rule.most - 1) or count <= rule.least
        assert rule.seconds(header) == pytest.approx(2 * header.frames / count / header.rate)  # type: ignore[operator]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_of_it_is_the_processors_where_that_can_be_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    # transformers 5.17 writes a checkpoint's sizes into the class, and so into every later processor's defaults
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    monkeypatch.setattr(Qwen2VLVideoProcessor, "size", size)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIGS[name]))
    processor, rule = Qwen2VLVideoProcessor.from_pretrained(tmp_path), VideoRule.read(CONFIGS[name])
    for header in headers(400):
        told = VideoMetadata(total_num_frames=header.frames, fps=header.rate)
        places = processor.sample_frames(told, fps=rule.rate).tolist()
        assert len(places) - rule.shown(header) in (0, 1)  # of its rounding one beyond the end may come
        assert places == processor.sample_frames(told, num_frames=rule.shown(header)).tolist()
    for header in headers(12):
        small = VideoHeader(5, None, header.width // 4, header.height // 4)
        values = processor(
            videos=[torch.zeros(5, 3, small.height, small.width, dtype=torch.uint8)], return_tensors="pt"
        )
        assert values["video_grid_thw"].tolist() == [[*rule.grid(small)]]


def test_chosen_frames_are_all_shown_and_an_odd_one_fills_a_step() -> None:
    rule = VideoRule.read(SMALL)
    assert rule.grid(VideoHeader(5, None, 112, 84)) == (3, 6, 8)
    assert rule.seconds(VideoHeader(5, None, 112, 84)) == 1.0
    assert rule.grid(VideoHeader(1, None, 112, 84)) == (1, 6, 8)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (VideoHeader(1, 30.0, 56, 56), "of 1 frames is too short: the model needs 2"),
        (VideoHeader(769, None, 56, 56), "a list of 769 frames; 1 to 768"),
        (VideoHeader(30, 30.0, 2010, 10), "longer than 200 times"),
    ],
)
def test_what_the_processor_cannot_take_is_refused(header: VideoHeader, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        VideoRule.read(SMALL).grid(header)


@pytest.mark.usefixtures("all_there")
def test_pictures_and_videos_stand_in_one_prompt(tmp_path: Path) -> None:
    family = open_family(checkpoint(tmp_path))
    assert family.modalities == (Modality.IMAGE, Modality.VIDEO)
    video = family.span(VideoHeader(50, 25.0, 112, 84), 1)
    assert video == Span((2, 6, 8), 24, Modality.VIDEO, 1.0)
    picture = family.span(PictureHeader(56, 56), 1)
    prompt = family.expand([1, VIDEO, 2, IMAGE, 3], [picture, video])
    assert prompt.tokens == [1, *[VIDEO] * 24, 2, *[IMAGE] * 4, 3]
    assert [(item.modality, item.offset, item.seconds) for item in prompt.items] == [
        ("video", 1, 1.0),
        ("image", 26, 0),
    ]
    assert prompt.sources == [1, 0]
    with pytest.raises(ValueError, match="0 places for videos, and there are 1 videos"):
        family.expand([1, IMAGE], [picture, video])


def test_the_video_processors_own_settings_come_first(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    family: Any = open_family(tmp_path)
    assert family.video.frame.max_pixels == 200704
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"fps": 1, "max_pixels": 100352}))
    family = open_family(tmp_path)
    assert (family.video.rate, family.video.frame.max_pixels, family.rule.max_pixels) == (1, 100352, 200704)
    nested = {"video_processor": {"max_frames": 8}, "image_processor": SMALL}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    family = open_family(tmp_path)
    assert (family.video.most, family.video.rate, family.video.frame.max_pixels) == (8, 2.0, 768 * 28 * 28)


def test_a_family_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "missing", lambda: ["torchvision"])
    family = open_family(checkpoint(tmp_path))
    assert family.modalities == (Modality.IMAGE,)
    assert family.obstacle(Modality.IMAGE) is None
    why = family.obstacle(Modality.VIDEO)
    assert why == "videos need torchvision, which is not installed here: pip install 'epdctl[video]'"
    with pytest.raises(ValueError, match="takes no videos"):
        family.span(VideoHeader(30, 30.0, 56, 56), 1)


@pytest.mark.usefixtures("all_there")
def test_qwen3_says_that_its_videos_are_not_served(tmp_path: Path) -> None:
    family = open_family(checkpoint(tmp_path, "qwen3_vl"))
    assert family.modalities == (Modality.IMAGE,)
    assert "send frames as pictures" in (family.obstacle(Modality.VIDEO) or "")
    with pytest.raises(ValueError, match="takes no videos"):
        family.span(VideoHeader(30, 30.0, 56, 56), 1)
