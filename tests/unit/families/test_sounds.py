"""Sound files by their headers: every kind that is served, and what is wrong with one."""

from __future__ import annotations

import contextlib
import io
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from epdctl.families import mp3
from epdctl.families.base import SoundHeader
from epdctl.families.mp3 import with_length
from epdctl.families.samples import WAV
from epdctl.families.sounds import header_of, opened
from tests.support.sounds import as_file, noise

KINDS = [
    *(("WAV", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")),
    *(("WAVEX", subtype) for subtype in ("PCM_16", "FLOAT")),
    ("RF64", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]
RATE = 24_000


def clip(kind: str = "WAV", subtype: str | None = None, *, seconds: float = 0.5, rate: int = RATE) -> bytes:
    return as_file(noise(3, seconds, rate, channels=2), rate, kind, subtype)


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_every_kind_says_how_long_it_is(kind: str, subtype: str) -> None:
    assert header_of(clip(kind, subtype)) == SoundHeader(RATE // 2, RATE)


def test_the_canary_is_a_clip_of_forty_milliseconds() -> None:
    assert header_of(WAV) == SoundHeader(640, 16_000)
    with opened(WAV) as file:
        samples = file.read(dtype="float32")
    assert np.ptp(samples) > 0.9


BAD = {
    "nothing": (b"", "not a sound clip"),
    "text": (b"what is this?", "not a sound clip"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a sound clip"),
    "another kind that the library knows": (clip("AIFF"), "not a sound clip"),
    "a header without sound": (clip()[:30], "end is missing"),
    "half a WAV": (clip()[: len(clip()) // 2], "end is missing"),
    "a FLAC without its head": (clip("FLAC")[:30], "not a sound clip"),
    "half an OGG": (clip("OGG")[: len(clip("OGG")) // 2], "end is missing"),
    "no samples": (as_file(np.zeros(0, np.float32)), "no samples"),
    "a rate of nobody": (as_file(np.zeros(100, np.float32), 500), "of 500 Hz"),
    "too many channels": (as_file(np.zeros((100, 17), np.float32)), "17 channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_clip_is_refused_with_the_reason(name: str) -> None:
    data, words = BAD[name]
    with pytest.raises(ValueError, match=words) as caught:
        header_of(data)
    assert "BytesIO" not in str(caught.value), "the library's words tell of our objects"


def test_a_wav_that_was_written_before_its_length_was_known_is_as_long_as_it_is() -> None:
    data = bytearray(clip("WAV", "PCM_16"))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"
    assert header_of(bytes(data)) == SoundHeader(RATE // 2, RATE)


def test_a_flac_that_was_written_as_a_stream_is_refused_with_the_reason() -> None:
    data = bytearray(clip("FLAC"))
    data[21] &= 0xF0  # the last 36 of these 64 bits are the number of samples
    data[22:26] = bytes(4)
    with pytest.raises(ValueError, match="does not say how long it is"):
        header_of(bytes(data))


def untagged(data: bytes) -> bytes:
    """An MP3 without the frame that says how long it is."""
    tag = min(at for name in (b"Xing", b"Info") if (at := data.find(name)) >= 0)
    start = data.index(data[:2], tag)
    while with_length(data[start:]) == data[start:]:  # two bytes that are no header
        start = data.index(data[:2], start + 1)
    return data[start:]


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_an_mp3_that_does_not_say_how_long_it_is_is_counted(rate: int) -> None:
    """Loud, then silent: from its first bitrate it would be guessed wrongly."""
    samples = np.concatenate([noise(4, 3.0, rate), np.zeros(6 * rate, np.float32)])
    bare = untagged(as_file(samples, rate, "MP3"))
    guessed = soundfile.info(io.BytesIO(bare)).frames
    found = header_of(bare).frames
    assert abs(found - 9 * rate) < 4 * 1152
    assert abs(guessed - 9 * rate) > rate, "the library has learned to count"
    with opened(bare) as file:
        assert len(file.read()) == found


def test_millions_of_frames_of_an_mp3_are_counted_without_building_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of 64 MB holds as many, and whoever sends it pays nothing."""
    head = b"\xff\xf3\x14\xc4"  # 8 kbit/s at 24 kHz: 24 bytes
    built = Mock(wraps=mp3._frame)
    monkeypatch.setattr(mp3, "_frame", built)
    mp3._nbytes.cache_clear()
    data = with_length((head + bytes(20)) * 100_000)
    assert built.call_count < 10
    assert int.from_bytes(data[(at := data.index(b"Info") + 8) : at + 4], "big") == 100_000


def test_an_mp3_that_ends_within_a_frame_is_damaged() -> None:
    bare = untagged(clip("MP3", seconds=2.0))
    with pytest.raises(ValueError, match="ends within a frame"):
        header_of(bare[:-20])


@pytest.mark.parametrize(("rest", "counted"), [(b"TAG" + bytes(125), True), (bytes(50), True), (b"what?" * 9, False)])
def test_what_follows_the_last_frame_of_an_mp3(rest: bytes, counted: bool) -> None:
    bare = untagged(clip("MP3"))
    assert (with_length(bare + rest) != bare + rest) == counted
    assert header_of(bare + rest).frames > RATE // 4


def test_an_mp3_behind_words_about_itself() -> None:
    words = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 0]) + bytes(128)
    assert header_of(words + clip("MP3")) == header_of(clip("MP3"))
    assert abs(header_of(words + untagged(clip("MP3"))).frames - RATE // 2) < 4 * 1152


@given(
    st.binary(max_size=300),
    st.sampled_from(
        [WAV[:44], WAV[:20], b"fLaC", b"OggS", b"ID3", b"\xff\xfb\x90\x00", b"RF64\xff\xff\xff\xffWAVE", b""]
    ),
)
def test_any_bytes_are_a_clip_or_refused(data: bytes, start: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert header_of(start + data).frames > 0
