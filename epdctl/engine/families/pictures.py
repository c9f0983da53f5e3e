"""From the bytes of a picture to RGB pixels of the promised size, and to what the family's processor makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from epdctl.engine.families.halves import load_refusals
from epdctl.errors import LoadError, RequestError
from epdctl.families.media import PictureFamily
from epdctl.families.pictures import opened, pillow, turn_of
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

__all__ = ["check_grid", "load_processor", "open_frame", "open_picture"]


def open_picture(media: bytes | memoryview, item: MediaItem, family: PictureFamily) -> Image.Image:
    """Upright, RGB, its alpha dropped: transformers' own treatment of alpha changes between versions, ours does not.

    The pixels are decoded only once the header has the promised size, lying or standing. Raises RequestError (400).
    """
    try:
        with opened(media) as picture:
            _check_header(picture.size, item, family)
            return _upright_rgb(picture)
    except ValueError as error:
        raise RequestError(400, str(error), code="invalid_image") from error


def open_frame(media: bytes) -> Image.Image:
    """Of a video that is a list of pictures: upright, RGB. Raises ValueError."""
    try:
        with opened(media) as picture:
            return _upright_rgb(picture)
    except ValueError as error:
        raise ValueError(f"a frame of it: {error}") from error


def _upright_rgb(picture: Image.Image) -> Image.Image:
    """Decoded; most pictures are upright and RGB already, and are not copied. Raises ValueError."""
    with pillow():
        picture.load()
        turn = turn_of(picture.getexif())
        upright = picture if turn is None else picture.transpose(turn)
        return upright if upright.mode == "RGB" else upright.convert("RGB")


def check_grid(item: MediaItem, found: Sequence[int]) -> None:
    """Raises RequestError (400) for a medium that is not what the request was sized for."""
    if list(found) != list(item.grid):
        text = f"the {item.modality.noun} is {[*found]}, the request was sized for {[*item.grid]}"
        raise RequestError(400, text, code=f"invalid_{item.modality}")


def load_processor(model: ModelConfig, kinds: dict[str, Callable[[], Any]]) -> Any:
    """``kinds``: what image_processor may say, and how to get that class: they differ in pixels, so the plan pins one.

    Raises LoadError.
    """
    if model.image_processor not in kinds:
        raise LoadError(
            f"no image processor {model.image_processor!r}", hint=f"image_processor: {' or '.join(sorted(kinds))}"
        )
    with load_refusals(Path(model.path)):
        return kinds[model.image_processor]().from_pretrained(model.path, local_files_only=True)


def _check_header(size: tuple[int, int], item: MediaItem, family: PictureFamily) -> None:
    """Of the two ways in which the picture may be turned, one must be as promised."""
    standing, lying = (family.picture_tokens(*each, item.of) for each in (size, size[::-1]))
    for found in (lying, standing):
        if (list(found.grid), found.rows) == (list(item.grid), item.rows):
            return
    check_grid(item, standing.grid)
    raise RequestError(
        400,
        f"the picture makes {standing.rows} rows, the request was sized for {item.rows}",
        code="invalid_image",
    )
