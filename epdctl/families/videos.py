"""Video files: known by their content, opened, and measured from the header. Decodes no frame; free of torch."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from epdctl.families.base import VideoHeader
from epdctl.families.turns import quarter_turns

if TYPE_CHECKING:
    from av.codec.context import CodecContext
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["EXTRA", "KINDS", "NEEDED", "Video", "header_of", "missing", "opened"]

NEEDED = ("torchvision", "av")  # transformers' video processors need the first, and files a decoder
EXTRA = "pip install 'epdctl[video]'"  # what brings both
KINDS = ("MP4", "QuickTime", "WebM", "Matroska", "AVI")
CODECS = frozenset(
    {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"}
)  # FFmpeg knows more, most of them seldom run
MOST_RATE = 240.0  # frames a second

_MICROSECONDS = 1_000_000  # FFmpeg's unit for the length of a file
_UNREADABLE = f"not a video we can read ({', '.join(KINDS)}), or a damaged one"


def missing() -> list[str]:
    """The packages that videos need and that are not there. Imports none of them."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@dataclass(frozen=True, slots=True)
class Video:
    """An open file, and its one stream that is shown. ``turns``: quarters against the clock that make its pictures
    upright, as ``header`` has them."""

    container: InputContainer
    stream: VideoStream
    header: VideoHeader
    turns: int


def header_of(data: bytes) -> VideoHeader:
    """Raises ValueError like ``opened``."""
    with opened(data) as video:
        return video.header


@contextmanager
def opened(data: bytes) -> Iterator[Video]:
    """Raises ValueError with the reason for what is no video, or does not say how long and large it is; and for what
    turns out to be damaged while it is open."""
    import av  # 100 ms that most processes never need

    demuxer = _demuxer(data)
    try:
        with av.open(io.BytesIO(data), "r", format=demuxer, metadata_errors="replace", io_open=_refuse) as container:
            stream = _stream(container)
            turns = quarter_turns(data, stream.id) if demuxer == "mov" else 0
            yield Video(container, stream, _header(container, stream, turns), turns)
    except av.FFmpegError as error:  # many of them are OSError too; their words tell of our objects
        raise ValueError(_UNREADABLE) from error


def _demuxer(data: bytes) -> str:
    """By content, so that FFmpeg guesses nothing: some of what it knows reads other files."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise ValueError(_UNREADABLE)


def _refuse(*_: object) -> NoReturn:
    """A file that names others gets none."""
    raise ValueError(_UNREADABLE)


def _stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise ValueError("the file has no moving picture")
    stream = container.streams.video[0]
    context: CodecContext | None = stream.codec_context  # None where FFmpeg knows no decoder, which is not declared
    codec = "what nobody decodes" if context is None else context.codec.canonical_name
    if codec not in CODECS:
        raise ValueError(f"the video is coded as {codec}; served: {', '.join(sorted(CODECS))}")
    stream.codec_context.thread_count = 1  # ranks share cores, and preprocess several items at once
    return stream


def _header(container: InputContainer, stream: VideoStream, turns: int) -> VideoHeader:
    rate = float(stream.average_rate or 0)
    if not 0 < rate <= MOST_RATE:
        raise ValueError(f"the video shows {rate:g} frames a second; at most {MOST_RATE:g} are served")
    shown = None if container.duration is None else round(container.duration / _MICROSECONDS * rate)
    frames = min(filter(None, (stream.frames, shown)), default=0)  # a cut file holds more than it shows
    if frames < 1 or stream.width < 1 or stream.height < 1:
        raise ValueError("the video does not say how long or how large it is: write it anew (ffmpeg -i it -c copy new)")
    width, height = (stream.height, stream.width) if turns % 2 else (stream.width, stream.height)
    return VideoHeader(frames, rate, width, height)
