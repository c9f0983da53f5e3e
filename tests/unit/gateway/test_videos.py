"""Videos in requests: prompts as transformers makes them, what is refused, and what is missing. No rank, no socket."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from epdctl.errors import RequestError
from epdctl.families import videos
from epdctl.families.base import VideoHeader
from epdctl.gateway.intake import Intake, Order, remote_urls
from epdctl.gateway.schema import ChatRequest
from epdctl.wire.config import Limits
from tests.support.checkpoints import model_config, tiny_checkpoint
from tests.support.reference import own_processor, picture_bytes
from tests.support.sounds import sound_bytes
from tests.support.videos import chosen_frames, video_bytes
from tests.unit.gateway.harness import ask, data_url, image_part, picture

LIMITS = Limits(max_media=4, max_clip_seconds=20.0, max_context=2000)
FILE = video_bytes(1)


def video_url(url: object) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def video(data: bytes, kind: str = "video/mp4") -> dict[str, Any]:
    return video_url(data_url(data, kind))


def frames_url(files: list[bytes]) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(file).decode() for file in files)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture
def intake(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Intake:
    monkeypatch.setattr(videos, "missing", list)
    return Intake(model_config(checkpoint), LIMITS)


def order_of(intake: Intake, body: dict[str, Any]) -> Order:
    return intake.order(intake.read(ChatRequest, json.dumps(body).encode()), {})


def test_the_prompt_is_transformers_own_with_each_medium_in_its_place(checkpoint: Path, intake: Intake) -> None:
    words = {"type": "text", "text": "What moves here?"}
    order = order_of(intake, ask([video(FILE), image_part(picture()), video(FILE, "video/webm"), words]))
    kinds = [{"type": "video"}, {"type": "image"}, {"type": "video"}, words]
    tokenizer = own_processor(checkpoint).tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": kinds}], tokenize=False, add_generation_prompt=True
    )
    rows = 3 * 6 * 8 // 4  # six frames of 112 x 84
    text = text.replace("<|video_pad|>", "<|video_pad|>" * rows).replace("<|image_pad|>", "<|image_pad|>" * 4)
    assert order.prompt.tokens == tokenizer(text)["input_ids"]
    assert [(each.modality, each.of, each.rows) for each in map(order.media_item, range(3))] == [
        ("video", 2, rows),
        ("image", 1, 4),
        ("video", 2, rows),
    ]
    assert order.media[0].data == FILE


def test_a_list_of_frames_is_a_video(intake: Intake) -> None:
    files, medium = chosen_frames(1, 5)
    order = order_of(intake, ask([video_url(frames_url(files))]))
    assert order.media[0].data == medium
    assert order.media[0].header == VideoHeader(5, None, 112, 84)
    (item,) = order.prompt.items
    assert (item.grid, item.seconds) == ([3, 6, 8], 1.0)


def test_a_video_at_an_address_is_fetched_and_measured(intake: Intake) -> None:
    url = "https://films.example/a.mp4"
    request = intake.read(ChatRequest, json.dumps(ask([video_url(url)])).encode())
    (source,) = remote_urls(request).values()
    assert (source.modality, source.place) == ("video", "messages[0].content[0].video_url.url")
    assert intake.order(request, {url: FILE}).media[0].header == VideoHeader(30, 10.0, 112, 84)


URL = "messages[0].content[0].video_url.url"

# request, param, a piece of the message
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no address": (ask([{"type": "video_url", "video_url": {}}]), URL, "required"),
    "a number": (ask([video_url(7)]), URL, "string"),
    "an address that is none": (ask([video_url("film.mp4")]), URL, "expected data:video/mp4;base64"),
    "not base64": (ask([video_url("data:video/mp4;base64,*")]), URL, "not base64"),
    "words": (ask([video_url("data:video/mp4;base64,blé")]), URL, "not base64"),
    "empty": (ask([video_url("data:video/mp4;base64,")]), URL, "the video is empty"),
    "a picture's URL": (ask([video_url(data_url(picture()))]), URL, "not a data: URL of a video"),
    "a picture": (ask([video(picture())]), URL, "not a video we can read (MP4, QuickTime, WebM, Matroska, AVI)"),
    "half a video": (ask([video(FILE[:3000])]), URL, "not a video we can read"),
    "too long": (ask([video(video_bytes(1, 21, 1))]), URL, "21.0 s long; at most 20"),
    "one frame": (ask([video(video_bytes(1, 1))]), URL, "too short"),
    "frames with a hole": (ask([video_url(frames_url([picture_bytes(1, 56, 56), b""]))]), URL, "is empty"),
    "frames that are none": (ask([video_url(frames_url([b"what?"]))]), URL, "not a picture"),
    "frames of two sizes": (
        ask([video_url(frames_url([picture_bytes(1, 56, 56), picture_bytes(1, 84, 84)]))]),
        URL,
        "of 2 sizes",
    ),
    "too many": (ask([video(FILE)] * 5), "messages", "5 videos; at most 4"),
    "sound": (
        ask([{"type": "audio_url", "audio_url": {"url": data_url(sound_bytes(1, 0.1), "audio/wav")}}]),
        "messages[0].content[0].audio_url.url",
        "takes no sound clips; beside text it takes pictures (image_url), videos (video_url)",
    ),
    "beyond the context": (ask([video(video_bytes(1, 200, 10, (448, 448)))]), "messages", "2000 tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_with_their_place_and_reason(intake: Intake, name: str) -> None:
    body, param, text = MISTAKES[name]
    with pytest.raises(RequestError) as caught:
        order_of(intake, body)
    assert (caught.value.status, caught.value.param) == (400, param), caught.value.message
    assert text in caught.value.message


@pytest.mark.parametrize("missing", [["torchvision"], ["torchvision", "av"]])
def test_without_what_videos_need_a_400_names_it(
    missing: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "missing", lambda: missing)
    intake = Intake(model_config(checkpoint), LIMITS)
    with pytest.raises(RequestError) as caught:
        order_of(intake, ask([video(FILE)]))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, URL, "unsupported_modality")
    assert f"videos need {' and '.join(missing)}, which" in caught.value.message
    assert "pip install 'epdctl[video]'" in caught.value.message
    assert order_of(intake, ask([image_part(picture())])).prompt.items  # pictures as ever


def test_qwen3_says_what_it_does_not_take(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "missing", list)
    intake = Intake(model_config(tiny_checkpoint(tmp_path_factory, family="qwen3_vl")), LIMITS)
    with pytest.raises(RequestError, match=r"Qwen3-VL's videos, .* are not served: send frames as pictures"):
        order_of(intake, ask([video(FILE)]))
