"""From the bytes of a picture to its pixels: whatever the bytes are, it is a picture or a 400 in our own words."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from PIL import Image, ImageFile

from epdctl.engine.families.pictures import open_frame, open_picture
from epdctl.errors import RequestError
from epdctl.families.base import Span
from epdctl.families.media import PictureFamily
from epdctl.families.pictures import header_of
from epdctl.ids import Modality
from epdctl.wire.encode import MediaItem
from tests.support.pictures import ASCII, ORIENTATION, RATIONAL, behind_the_pixels, exif, png_chunk, saved, short

SIZE = (48, 36)
TOLD = exif(
    [
        short(ORIENTATION, 6),
        (0x010F, ASCII, 12, b"Some camera\0"),
        (0x011A, RATIONAL, 1, (72).to_bytes(4) + (1).to_bytes(4)),
    ]
)
OURS = "not a picture we can read (PNG, JPEG, WEBP, GIF, BMP), or a damaged one"


class PixelByPixel(PictureFamily):
    """A family that takes a picture as it is."""

    def __init__(self) -> None:
        """Without a checkpoint."""

    def picture_tokens(self, width: int, height: int, of: int) -> Span:
        return Span((1, height, width), width * height)


def item(width: int, height: int) -> MediaItem:
    return MediaItem(
        index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, height, width], rows=width * height
    )


def samples() -> Iterator[bytes]:
    noise = Image.frombytes("RGB", SIZE, random.Random(3).randbytes(3 * SIZE[0] * SIZE[1]))
    for form in ("JPEG", "PNG", "WEBP"):
        yield saved(noise, form, exif=TOLD)
    yield saved(noise, "JPEG", progressive=True)
    yield saved(noise.convert("P"), "PNG", transparency=3)
    yield behind_the_pixels(saved(noise, "PNG"), png_chunk(b"eXIf", TOLD[6:]))
    yield saved(noise, "PNG", save_all=True, append_images=[noise.rotate(180)])
    yield saved(noise, "GIF")
    yield saved(noise, "BMP")


SAMPLES = list(samples())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_a_picture_with_any_bytes_changed_is_a_picture_or_a_400(number: int) -> None:
    """Near the front most often: there are the headers and what a picture says of itself. And a picture has the size
    that the gateway read from its header."""
    draw, file = random.Random(number), SAMPLES[number]
    refusals = 0
    for _ in range(400):
        changed = bytearray(file)
        for _ in range(draw.choice([1, 1, 2, 8])):
            place = draw.randrange(min(draw.choice([60, 250, len(file)]), len(file)))
            changed[place] = draw.choice([0, 1, 2, 5, 255, draw.randrange(256)])
        found = outcome(bytes(changed))
        if isinstance(found, RequestError):
            refusals += 1
            assert (found.status, found.code) == (400, "invalid_image")
            assert found.message == OURS or "sized for" in found.message or "too many pixels" in found.message
        else:
            measured = header_of(bytes(changed))
            assert (found.mode, found.size) == ("RGB", (measured.width, measured.height))
    assert 0 < refusals < 400, "no byte mattered, or each did"


def outcome(file: bytes) -> Image.Image | RequestError:
    try:
        return open_picture(file, item(*SIZE), PixelByPixel())
    except RequestError as error:
        return error


@pytest.mark.parametrize("error", [TypeError, AttributeError, AssertionError, ZeroDivisionError, RecursionError])
def test_whatever_pillow_raises_is_told_in_our_words(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error("<PIL.Image.Image at 0x7f00>")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(RequestError) as caught:
        open_picture(saved(Image.new("RGB", SIZE), "BMP"), item(*SIZE), PixelByPixel())
    assert (caught.value.status, caught.value.message) == (400, OURS)


def test_memory_that_runs_out_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        open_picture(saved(Image.new("RGB", SIZE), "BMP"), item(*SIZE), PixelByPixel())


def test_a_frame_that_is_damaged_says_so_in_our_words() -> None:
    with pytest.raises(ValueError, match="a frame of it: not a picture we can read"):
        open_frame(SAMPLES[0][:200])
