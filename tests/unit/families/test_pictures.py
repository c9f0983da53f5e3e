"""Picture files by their headers: what stands behind the pixels of a PNG, and what is wrong with a file."""

from __future__ import annotations

import pytest
from PIL import Image

from epdctl.families import pictures
from epdctl.families.base import PictureHeader
from epdctl.families.pictures import header_of
from tests.support.pictures import ORIENTATION, behind_the_pixels, exif, png_chunk, saved, short

WIDE = saved(Image.new("RGB", (40, 20), "red"), "PNG")
TURN = png_chunk(b"eXIf", exif([short(ORIENTATION, 6)])[6:])
LYING, STANDING = PictureHeader(40, 20), PictureHeader(20, 40)


def test_a_turn_behind_the_pixels_is_seen() -> None:
    assert header_of(WIDE) == LYING
    assert header_of(behind_the_pixels(WIDE, TURN)) == STANDING


def test_a_file_that_breaks_off_behind_its_pixels_is_measured_by_what_is_whole() -> None:
    file = behind_the_pixels(WIDE, TURN)
    begins = file.index(TURN)
    found = [header_of(file[:end]) for end in range(begins, len(file))]
    whole = len(TURN) - 4  # its checksum is not looked at
    assert found == [LYING] * whole + [STANDING] * (len(found) - whole)


def test_what_is_no_chunk_ends_the_look() -> None:
    assert header_of(behind_the_pixels(WIDE, b"\0\0\0\0!?\n.", TURN)) == LYING
    assert header_of(WIDE + TURN) == LYING


def test_chunks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    many = behind_the_pixels(WIDE, *[png_chunk(b"prVt", b"")] * 20, TURN)
    monkeypatch.setattr(pictures, "MOST_CHUNKS", 24)
    assert header_of(many) == STANDING  # IHDR, IDAT, 20, eXIf, IEND
    monkeypatch.setattr(pictures, "MOST_CHUNKS", 22)
    with pytest.raises(ValueError, match="a PNG of more than 22 chunks"):
        header_of(many)


@pytest.mark.parametrize("form", pictures.FORMATS)
def test_every_kind_is_served(form: str) -> None:
    assert header_of(saved(Image.new("RGB", (40, 20)), form)) == LYING


def test_another_kind_is_refused_by_names_of_those_served() -> None:
    with pytest.raises(ValueError, match=r"not a picture we can read \(PNG, JPEG, WEBP, GIF, BMP\)"):
        header_of(saved(Image.new("RGB", (40, 20)), "TIFF"))
