"""Video files by their headers: every kind that is served, what is wrong with one, and lists of chosen frames."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
from itertools import islice

import numpy as np
import pytest

from epdctl.families import videos
from epdctl.families.base import VideoHeader
from epdctl.families.frames import are_frames, pack, unpack
from epdctl.families.samples import PNG, WAV
from epdctl.families.turns import quarter_turns
from epdctl.ids import Modality
from epdctl.rank import headers
from epdctl.rank.headers import read_header
from epdctl.wire.config import Limits
from tests.support.reference import picture_bytes
from tests.support.videos import CODERS, chosen_frames, coded, sound_only, video_bytes


@pytest.mark.parametrize("what", CODERS)
def test_every_kind_says_how_long_and_how_large_it_is(what: str) -> None:
    assert videos.header_of(video_bytes(1, 37, 12, (160, 96), what)) == VideoHeader(37, 12.0, 160, 96)


def test_a_file_in_fragments_does_too() -> None:
    fragments = coded(BLANK, 5, options=FRAGMENTS)
    assert videos.header_of(fragments) == VideoHeader(8, 5.0, 64, 64)


FILE = video_bytes(1)
BLANK = np.zeros((8, 64, 64, 3), np.uint8)
FRAGMENTS = {"movflags": "+frag_keyframe+empty_moov"}
BAD = {
    "nothing": (b"", "not a video we can read (MP4, QuickTime, WebM, Matroska, AVI)"),
    "text": (b"what is this?", "not a video"),
    "a picture": (PNG, "not a video"),
    "sound": (WAV, "not a video"),
    "a list of addresses": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n", "not a video"),
    "a name without a file": (b"\0\0\0\x18ftypisom" + bytes(12), "not a video"),
    "half an MP4": (FILE[: len(FILE) // 2], "not a video"),
    "half a WebM's head": (video_bytes(1, what="WebM")[:60], "not a video"),
    "no picture in it": (sound_only(), "no moving picture"),
    "coded as nobody does": (coded(BLANK, 5, "matroska", "ffv1"), "coded as ffv1; served: av1, h264"),
    "too many frames a second": (coded(BLANK, 300), "300 frames a second; at most 240"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_said(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ValueError, match=re.escape(reason)):
        videos.header_of(data)


def test_every_cut_of_a_file_is_read_or_refused() -> None:
    for what in ("MP4", "WebM", "AVI"):
        file = video_bytes(1, what=what)
        for end in range(0, len(file), len(file) // 40):
            with contextlib.suppress(ValueError):
                assert videos.header_of(file[:end]).frames > 0


def test_files_with_any_bytes_changed_are_read_or_refused() -> None:
    draw = random.Random(11)
    files = [video_bytes(1, 12, 10, (64, 48), what) for what in CODERS]
    for _ in range(300):
        file = bytearray(draw.choice(files))
        for _ in range(draw.choice([1, 2, 8, 40])):
            place = draw.randrange(min(1200, len(file)))  # near an end: there the headers are
            file[draw.choice([place, -1 - place])] = draw.randrange(256)
        with contextlib.suppress(ValueError), videos.opened(bytes(file)) as video:
            for frame in islice(video.container.decode(video.stream), 3):
                assert frame.width > 0


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("kind", ["mp4", "mov"])
@pytest.mark.parametrize("options", [{}, FRAGMENTS], ids=["whole", "in fragments"])
def test_a_video_that_lies_on_its_side_is_measured_as_it_stands(kind: str, turn: int, options: dict[str, str]) -> None:
    wide = coded(np.zeros((4, 48, 64, 3), np.uint8), 5, kind, turn=turn, options=options)
    with videos.opened(wide) as video:
        assert (video.header.width, video.header.height) == ((48, 64) if turn % 180 else (64, 48))
        assert 90 * video.turns == next(video.container.decode(video.stream)).rotation % 360  # FFmpeg's own word


def test_damaged_boxes_turn_nothing() -> None:
    file = coded(BLANK, 5, turn=90)
    assert quarter_turns(file, 1) == 1
    assert quarter_turns(file, 2) == 0
    assert {quarter_turns(file[:end], 1) for end in range(0, len(file), 7)} <= {0, 1}
    at = file.index(b"tkhd") + 4
    for version in range(256):
        quarter_turns(file[:at] + bytes([version]) + file[at + 1 :], 1)
    for size in (0, 1, 2, 7, 8, 1 << 31):
        box = file.index(b"moov") - 4
        quarter_turns(file[:box] + size.to_bytes(4) + file[box + 4 :], 1)


def test_a_title_in_another_alphabet_is_no_fault() -> None:
    titled = coded(BLANK, 5, "matroska", title="B\u00fccher")
    assert titled.count("B\u00fccher".encode()) == 1
    assert videos.header_of(titled.replace("B\u00fccher".encode(), b"B\xfc\xfccher")).frames == 8


@pytest.mark.parametrize(
    ("limits", "most", "reason"),
    [
        (Limits(max_clip_seconds=2.9), None, "3.0 s long; at most 2.9 s"),
        (Limits(max_pixels=112 * 84 - 1), None, "112 x 84 pixels large; at most 9407"),
        (Limits(), 30 * 112 * 84 - 1, "30 frames of 9408 pixels: too many to decode"),
    ],
)
def test_bounds_are_held_before_a_frame_is_decoded(
    limits: Limits, most: int | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most is not None:
        monkeypatch.setattr(headers, "MOST_DECODED", most)
    with pytest.raises(ValueError, match=reason):
        read_header(Modality.VIDEO, FILE, limits)
    monkeypatch.undo()
    generous = Limits(max_clip_seconds=3.0, max_pixels=112 * 84)
    assert read_header(Modality.VIDEO, FILE, generous) == VideoHeader(30, 10.0, 112, 84)


def test_frames_that_somebody_chose_are_one_medium() -> None:
    files, medium = chosen_frames(1, 3)
    assert unpack(medium) == files
    assert are_frames(medium)
    assert not are_frames(FILE)
    assert read_header(Modality.VIDEO, medium, Limits()) == VideoHeader(3, None, 112, 84)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([picture_bytes(1, 56, 56), picture_bytes(2, 56, 84)], "of 2 sizes"),
        ([picture_bytes(1, 56, 56), b"what?"], "not a picture"),
        ([], "of 0 sizes"),
    ],
)
def test_frames_that_do_not_fit_are_refused(files: list[bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_header(Modality.VIDEO, pack(files), Limits())


def test_every_cut_of_a_list_is_refused_but_between_frames() -> None:
    files, medium = chosen_frames(1, 2, (28, 28))
    whole = {len(pack(files[:count])) for count in range(3)}
    for end in range(len(pack([])), len(medium) + 1):
        if end in whole:
            unpack(medium[:end])
        else:
            with pytest.raises(ValueError, match="ends within"):
                unpack(medium[:end])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else object())
    assert videos.missing() == ["torchvision"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert videos.missing() == ["torchvision", "av"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert videos.missing() == []
