"""Pictures as people send them: the size that the gateway reads from the header and the pixels that the tower takes
are those of transformers' ``load_image`` and of the family's processor."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image

from epdctl.engine.api import Tower
from epdctl.errors import RequestError
from epdctl.families.base import PictureHeader
from epdctl.ids import Modality
from epdctl.rank.media import Source, measure
from epdctl.wire.config import Limits
from epdctl.wire.encode import MediaItem
from tests.engine.harness import media_item
from tests.support.checkpoints import every_family
from tests.support.pictures import ASCII, ORIENTATION, RATIONAL, behind_the_pixels, exif, png_chunk, saved, short
from tests.support.reference import own_processor

pytestmark = every_family


def noise(mode: str = "RGB", width: int = 90, height: int = 60) -> Image.Image:
    """Blocks and not grains, so that a lossy format keeps what there is."""
    draw = np.random.default_rng(7)
    channels = len(Image.new(mode, (1, 1)).getbands())
    small = draw.integers(0, 256, (height // 6, width // 6, channels), dtype=np.uint8)
    bands = [Image.fromarray(small[:, :, band]).resize((width, height)) for band in range(channels)]
    return Image.merge(mode, bands) if channels > 1 else bands[0].convert(mode)


def turned(kind: str, orientation: int) -> bytes:
    return saved(noise(), kind, exif=exif([short(ORIENTATION, orientation)]))


TURNED = exif([short(ORIENTATION, 6)])[6:]  # as PNG has it
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
RAW = f"\nexif\n{len(TURNED):8}\n{TURNED.hex()}\n".encode()  # as ImageMagick writes it
LATE: dict[str, tuple[bytes, ...]] = {  # what may stand behind the pixels of a PNG
    "EXIF": (png_chunk(b"eXIf", TURNED),),
    "EXIF without its checksum": (png_chunk(b"eXIf", TURNED)[:-4] + bytes(4),),
    "EXIF after other things": (png_chunk(b"tIME", bytes(7)), png_chunk(b"eXIf", TURNED)),
    "XMP": (png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),),
    "a raw profile": (png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)),),
    "a comment": (png_chunk(b"tEXt", b"Comment\0Orientation 6"),),
    "two that differ": (png_chunk(b"eXIf", exif([short(ORIENTATION, 3)])[6:]), png_chunk(b"eXIf", TURNED)),
}


def animated_png(late: bytes) -> bytes:
    """The second picture's chunks come before ``late``."""
    frames = [noise(), Image.new("RGB", (90, 60), "blue")]
    return behind_the_pixels(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), late)


def palette(**options: object) -> bytes:
    return saved(noise().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", **options)


def sixteen_bits() -> bytes:
    grey = np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16)
    return saved(Image.fromarray(grey), "PNG")


def animated(kind: str) -> bytes:
    frames = [noise(), Image.new("RGB", (90, 60), "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def with_profile() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Description", "a picture " * 50, zip=True)
    return saved(noise(), "PNG", pnginfo=text, dpi=(300, 300))


KINDS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: saved(noise(), "PNG"),
    "grey": lambda: saved(noise("L"), "PNG"),
    "black and white": lambda: saved(noise("L").convert("1"), "PNG"),
    "palette": palette,
    "palette with a transparent colour": lambda: palette(transparency=3),
    "alpha": lambda: saved(noise("RGBA"), "PNG"),
    "grey with alpha": lambda: saved(noise("LA"), "PNG"),
    "16 bits": sixteen_bits,
    "texts within": with_profile,
    "JPEG": lambda: saved(noise(), "JPEG"),
    "progressive JPEG": lambda: saved(noise(), "JPEG", progressive=True),
    "grey JPEG": lambda: saved(noise("L"), "JPEG"),
    "CMYK JPEG": lambda: saved(noise("CMYK"), "JPEG"),
    "WebP": lambda: saved(noise(), "WEBP"),
    "WebP with alpha": lambda: saved(noise("RGBA"), "WEBP", lossless=True),
    "animated WebP": lambda: animated("WEBP"),
    "GIF": lambda: saved(noise(), "GIF"),
    "animated GIF": lambda: animated("GIF"),
    "BMP": lambda: saved(noise(), "BMP"),
    "one pixel": lambda: saved(Image.new("RGB", (1, 1), "red"), "PNG"),
    "very wide": lambda: saved(noise(width=1800, height=12), "PNG"),
    "very tall": lambda: saved(noise(width=12, height=1800), "PNG"),
} | {f"turned {n}": (lambda n=n: turned("JPEG", n)) for n in range(2, 9)} | {
    "a turned PNG": lambda: turned("PNG", 6),
    "a turned WebP": lambda: turned("WEBP", 8),
    "a turn that is no integer": lambda: saved(
        noise(), "JPEG", exif=exif([(ORIENTATION, RATIONAL, 1, struct.pack(">II", 6, 1))])
    ),
    "a turn that is none": lambda: turned("JPEG", 9),
    "an animated PNG turned behind its second picture": lambda: animated_png(*LATE["EXIF"]),
} | {
    f"a PNG with {what} behind its pixels": (lambda late=late: behind_the_pixels(saved(noise(), "PNG"), *late))
    for what, late in LATE.items()
}  # fmt: skip


def as_transformers_loads(file: bytes) -> Image.Image:
    loaded: Image.Image = load_image(base64.b64encode(file).decode())
    return loaded


def of_the_header(checkpoint: Path, file: bytes) -> tuple[PictureHeader, MediaItem]:
    """What the gateway knows, and what it tells the tower."""
    header = measure(file, Source(Modality.IMAGE, "here", ""), Limits()).header
    assert isinstance(header, PictureHeader)
    upright = saved(Image.new("RGB", (header.width, header.height)), "PNG")
    return header, media_item(checkpoint, upright, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_load_image_and_the_processor(checkpoint: Path, tower: Tower, kind: str) -> None:
    file = KINDS[kind]()
    theirs = as_transformers_loads(file)
    header, item = of_the_header(checkpoint, file)
    assert (header.width, header.height) == theirs.size
    found = tower.prepare(file, item)
    same = tower.prepare(saved(theirs, "PNG"), item)
    assert torch.equal(found.pixels, same.pixels)
    processor = own_processor(checkpoint).image_processor
    values = processor(images=[theirs], return_tensors="pt")["pixel_values"]
    assert torch.equal(found.pixels.flatten(), values.flatten()[: found.pixels.numel()].to(found.pixels.dtype))


ODD: dict[str, tuple[int, int, int, bytes]] = {  # in EXIF that Pillow reads and cannot write
    "a resolution in words": (0x011A, ASCII, 6, b"72.00\0"),
    "an artist in numbers": (0x013B, RATIONAL, 1, struct.pack(">II", 3, 7)),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_else_exif_says_does_not_matter(checkpoint: Path, tower: Tower, kind: str, what: str) -> None:
    """transformers would fail over some of these."""
    odd = saved(noise(), kind, exif=exif([short(ORIENTATION, 6), ODD[what]]))
    header, item = of_the_header(checkpoint, odd)
    assert (header.width, header.height) == (60, 90)
    assert torch.equal(tower.prepare(odd, item).pixels, tower.prepare(turned(kind, 6), item).pixels)


BROKEN: dict[str, Callable[[], bytes]] = {
    "half a PNG": lambda: saved(noise(), "PNG")[:400],
    "half a JPEG": lambda: saved(noise(), "JPEG")[:700],
    "half a WebP": lambda: saved(noise(), "WEBP")[:200],
    "half a GIF": lambda: saved(noise(), "GIF")[:900],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_half_a_picture_is_refused(checkpoint: Path, tower: Tower, kind: str) -> None:
    file = BROKEN[kind]()
    with pytest.raises(RequestError) as caught:
        tower.prepare(file, of_the_header(checkpoint, file)[1])
    assert caught.value.status == 400


def test_a_header_that_promises_another_size_is_refused_before_any_pixel(checkpoint: Path, tower: Tower) -> None:
    _, small = of_the_header(checkpoint, saved(noise(), "PNG"))
    with pytest.raises(RequestError, match="sized for"):
        tower.prepare(saved(noise(width=300, height=300), "PNG")[:200], small)
