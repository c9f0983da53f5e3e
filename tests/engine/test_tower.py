"""Pictures to embeddings: packed with others as alone, the same on many threads, and refusals a client understands."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image
from transformers import AutoModelForImageTextToText

from epdctl.engine.api import Prepared, Tower
from epdctl.errors import RequestError
from tests.engine.harness import media_item, pictures
from tests.support.checkpoints import every_family
from tests.support.reference import own_processor, picture_bytes

pytestmark = every_family

SIZES = [(140, 140), (112, 168), (300, 90), (84, 84), (56, 56)]


def prepared(tower: Tower, directory: Path, file: bytes) -> Prepared:
    return tower.prepare(file, media_item(directory, file, 0, 1))


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def whole_models(whole: Any, processor: Any, files: Sequence[bytes]) -> list[torch.Tensor]:
    """[rows, width] for each picture of one request, by the family's own processor and the undivided model."""
    seen = [opened(file).convert("RGB") for file in files]
    inputs = processor(text=[processor.image_token * len(seen)], images=[seen], return_tensors="pt")
    values = {key: inputs[key] for key in inputs if key.startswith(("pixel_", "image_", "batch_"))}
    with torch.no_grad():
        found = whole.model.get_image_features(**values, return_dict=True)
    sets = [found.pooler_output, *getattr(found, "deepstack_features", ())]
    rows = torch.cat([each if isinstance(each, torch.Tensor) else torch.cat(list(each)) for each in sets], dim=1)
    return [*torch.split(rows, [len(each) for each in found.pooler_output])]


def test_packed_pictures_get_what_the_whole_model_gives_them(checkpoint: Path, tower: Tower) -> None:
    """Of two requests with several pictures and of five with one, all in one forward."""
    files = pictures(1, SIZES)
    requests = [files[:2], *([file] for file in files), files[2:]]
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = own_processor(checkpoint)
    due = [rows for request in requests for rows in whole_models(whole, processor, request)]
    batch = [
        tower.prepare(file, media_item(checkpoint, file, index, len(request)))
        for request in requests
        for index, file in enumerate(request)
    ]
    found = tower.encode(batch)
    assert [tuple(each.shape) for each in found] == [(each.rows, tower.width) for each in batch]
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        assert float(one.std()) > 0.1


def test_one_of_several_is_the_same_in_whatever_company(checkpoint: Path, tower: Tower) -> None:
    """LLaVA-OneVision tiles a picture that stands alone in its request, not one that stands alone in a forward."""
    files = pictures(3, SIZES[:2])
    several = [tower.prepare(file, media_item(checkpoint, file, index, 2)) for index, file in enumerate(files)]
    lone = prepared(tower, checkpoint, files[0])
    both = tower.encode(several)
    for batch, at in (([several[0]], 0), ([several[0], lone], 0), ([lone, several[0]], 1)):
        torch.testing.assert_close(tower.encode(batch)[at], both[0], atol=2e-5, rtol=1e-5)


def test_what_a_forward_costs_is_its_patches(checkpoint: Path, tower: Tower) -> None:
    for each in (prepared(tower, checkpoint, file) for file in pictures(1, SIZES)):
        tiles = each.pixels.ndim == 4
        assert (
            each.patches
            == (16 * len(each.pixels) if tiles else len(each.pixels))
            == each.grid[0] * (16 if tiles else 4 * each.rows)
        )


def test_many_threads_prepare_as_one_does(checkpoint: Path, tower: Tower) -> None:
    files = pictures(2, SIZES * 8)
    alone = [prepared(tower, checkpoint, file) for file in files]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda file: prepared(tower, checkpoint, file), files))
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(alone, together, strict=True))


def test_a_view_of_bytes_is_as_good_as_bytes(checkpoint: Path, tower: Tower) -> None:
    file = picture_bytes(1, 100, 100)
    item = media_item(checkpoint, file, 0, 1)
    assert torch.equal(tower.prepare(memoryview(file), item).pixels, tower.prepare(file, item).pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(mode: str, checkpoint: Path, tower: Tower) -> None:
    picture = opened(picture_bytes(4, 90, 70)).convert(mode)
    file = saved(picture, "JPEG" if mode == "CMYK" else "PNG")
    due = saved(opened(file).convert("RGB"))
    assert torch.equal(prepared(tower, checkpoint, file).pixels, prepared(tower, checkpoint, due).pixels)


def test_alpha_is_dropped(checkpoint: Path, tower: Tower) -> None:
    picture = opened(picture_bytes(4, 90, 70)).convert("RGB")
    clear = picture.copy()
    clear.putalpha(0)
    seen = [prepared(tower, checkpoint, saved(each)).pixels for each in (picture, clear)]
    assert torch.equal(*seen)


def test_a_picture_lying_on_its_side_is_turned(checkpoint: Path, tower: Tower) -> None:
    picture = opened(picture_bytes(5, 168, 84)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    lying = saved(picture, exif=exif)
    upright = saved(picture.transpose(Image.Transpose.ROTATE_270))
    item = media_item(checkpoint, upright, 0, 1)
    assert torch.equal(tower.prepare(lying, item).pixels, tower.prepare(upright, item).pixels)


def test_an_animation_shows_its_first_frame(checkpoint: Path, tower: Tower) -> None:
    frames = [opened(picture_bytes(seed, 84, 84)).convert("P") for seed in (1, 2)]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    still = saved(frames[0], "GIF")
    assert torch.equal(prepared(tower, checkpoint, moving).pixels, prepared(tower, checkpoint, still).pixels)


GOOD = picture_bytes(6, 140, 112)
BROKEN = {
    "empty": b"",
    "text": b"this is not a picture",
    "cut short": GOOD[: len(GOOD) // 2],
    "header only": GOOD[:40],
    "bad middle": GOOD[:60] + bytes(40) + GOOD[100:],
    "jpeg cut short": picture_bytes(6, 140, 112, "JPEG")[:300],
    "another program's": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 140 112\nshowpage\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_bytes_are_a_400(kind: str, checkpoint: Path, tower: Tower) -> None:
    item = media_item(checkpoint, GOOD, 3, 4)
    with pytest.raises(RequestError, match=r"^not a picture") as caught:
        tower.prepare(BROKEN[kind], item)
    assert caught.value.status == 400


def test_a_picture_of_another_size_than_was_said_is_a_400(checkpoint: Path, tower: Tower) -> None:
    good = picture_bytes(6, 168, 84)
    item = media_item(checkpoint, good, 0, 1)
    for file in (picture_bytes(6, 168, 140), picture_bytes(6, 84, 168)):  # larger; turned without saying so
        with pytest.raises(RequestError, match="was sized for") as caught:
            tower.prepare(file, item)
        assert caught.value.status == 400
    with pytest.raises(RequestError, match="was sized for"):
        tower.prepare(good, structs.replace(item, rows=item.rows + 1))


def test_a_bomb_is_refused_by_its_header(checkpoint: Path, tower: Tower) -> None:
    """Its header promises more pixels than memory has; nothing of it may be unpacked."""
    bomb = saved(Image.fromarray(np.zeros((8, 9000), np.uint8)))
    width = (9000).to_bytes(4, "big")
    large = bomb.replace(width, (2**31 - 1).to_bytes(4, "big"), 1)
    with pytest.raises(RequestError) as caught:
        tower.prepare(large, media_item(checkpoint, GOOD, 0, 1))
    assert caught.value.status == 400
